"""What a client sends is bounded before memory is spent on it; each refusal says which limit."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest

from kvbaton.errors import InvalidRequestError
from services.gateway.http import server as http_server
from services.gateway.http.openai import schema
from services.gateway.http.openai.decoding import decode_body
from tests.security.http_keys import ASK, client_of, entry, face_with_keys
from tests.unit.gateway_fakes import FakeBackend, running_face, says

JSON = {"content-type": "application/json"}
PROMPT = '{"prompt": "x", '
DEEP = 100_000


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("completions", PROMPT + f'"colour": {nested(DEEP)}}}', None, "nested too deeply, the lim"),
        ("completions", PROMPT + '"x": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001, None, "deeply"),
        ("completions", f'{{"prompt": {nested(DEEP)}}}', None, "nested too deeply"),
        ("completions", nested(DEEP), None, "expected `object`"),
        ("completions", PROMPT + f'"logit_bias": {nested(DEEP)}}}', "logit_bias", "object"),
        ("completions", PROMPT + f'"regex": {nested(DEEP)}}}', None, "nested too deeply"),
        ("chat/completions", f'{{"messages": {nested(DEEP)}}}', "messages[0]", "object"),
        ("completions", PROMPT + '"n": 1000000000}', "n", "at most 128 choices"),
        ("completions", PROMPT + '"n": -1}', "n", "at least 1"),
        ("completions", PROMPT + '"n": ' + "9" * 5000 + "}", "n", "n: "),
        ("completions", '{"prompt": [' + '"a",' * 128 + '"a"]}', "n", "at most 128 choices"),
        ("completions", '{"prompt": [' + '"ab",' * 500_000 + '"a"]}', None, "65536 strings"),
        ("completions", PROMPT + '"stop": [' + '"ab",' * 500_000 + '"a"]}', None, "65536 strings"),
        ("completions", PROMPT + '"stop": [' + '"ab",' * 16 + '"a"]}', "stop", "at most 16"),
        ("completions", PROMPT + f'"stop": "{"x" * 1025}"}}', "stop", "1 to 1024 characters"),
        ("completions", PROMPT + f'"stop_token_ids": {[1] * 65}}}', "stop_token_ids", "at most 64"),
        (
            "completions",
            PROMPT + '"logit_bias": {' + ",".join(f'"{i}": 1' for i in range(60_000)) + "}}",
            "logit_bias",
            "token id 2048",
        ),
        (
            "chat/completions",
            json.dumps({"messages": [{"role": "user", "content": "x"}] * 4097}),
            "messages",
            "at most 4096 messages, got 4097",
        ),
        (
            "chat/completions",
            json.dumps(
                {"messages": [{"role": "u", "content": [{"type": "text", "text": "x"}] * 2049}] * 2}
            ),
            "messages",
            "at most 4096 content parts, got 4098",
        ),
        (
            "completions",
            json.dumps({"prompt": "x" * 7_000_000}),
            "prompt",
            "text of 7000000 characters does not fit the model's context of 2048 tokens",
        ),
        (
            "completions",
            json.dumps({"prompt": ["x" * 60_000] * 128}),
            "prompt",
            "60001 tokens, which leaves no room",
        ),
        (
            "chat/completions",
            json.dumps({"messages": [{"role": "user", "content": "x" * 7_000_000}]}),
            "messages",
            "does not fit the model's context of 2048 tokens",
        ),
        (
            "chat/completions",
            json.dumps({"messages": [{"role": "user"}] * 200_000}),
            None,
            "65536 strings",
        ),
    ],
)
async def test_bombs_are_refused_by_field_and_limit(
    path: str, body: str, field: str | None, words: str
) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        response = await client.post(f"/v1/{path}", content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == field
    assert backend.requests == []


def test_many_strings_are_found_before_they_are_made() -> None:
    body = b'{"prompt": "x", "colours": [' + b'"\\\\",' * 400_000 + b'"x"]}'
    honest = json.dumps({"prompt": '"' * 1_000_000}).encode()
    for kind in (schema.CompletionRequest, schema.ChatRequest):
        tracemalloc.start()
        with pytest.raises(InvalidRequestError, match="65536 strings"):
            decode_body(body, kind)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000
    assert decode_body(honest, schema.CompletionRequest).model is None


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_a_template_never_comes_with_a_request(path: str) -> None:
    template = "{{ messages }}"
    ask = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    fields: dict[str, Any] = {"chat_template": template}
    if path == "chat/completions":  # the other has no use for these
        fields["chat_template_kwargs"] = {"chat_template": template}
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        for field, value in fields.items():
            response = await client.post(f"/v1/{path}", json={**ask, field: value})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"].startswith(field)
            assert error["param"].endswith("chat_template")
    assert backend.requests == []


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /health HTTP/1.1\r\ncontent-length: 100\r\n\r\n",  # answered, and not over
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n",  # 401 before its body
    ],
)
async def test_a_body_that_nobody_reads_has_its_time_too(
    request_head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_BODY_TIMEOUT_S", 0.05)
    async with face_with_keys(FakeBackend(), entry("alice")) as (face, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        writer.write(request_head)
        async with asyncio.timeout(10):
            answer = b""
            try:
                while part := await reader.read(1000):
                    answer += part
            except ConnectionResetError:
                pass
        writer.close()
    assert answer.startswith(b"HTTP/1.1 ")


async def test_a_body_that_waits_for_us_has_all_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request on the connection, of which no more is read while the first is answered."""
    monkeypatch.setattr(http_server, "_BODY_TIMEOUT_S", 0.6)

    def request(prompt: str) -> bytes:
        body = json.dumps({"prompt": prompt}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
        return head + b"content-length: %d\r\n\r\n%s" % (len(body), body)

    backend = FakeBackend()
    async with running_face(backend) as face:
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        writer.write(request("x") + request("x" * 300_000))
        await backend.submitted()
        await asyncio.sleep(0.8)
        backend.streams[0].feed(says("x"))
        async with asyncio.timeout(10):
            await reader.readuntil(b"HTTP/1.1 200 OK")
            await reader.readuntil(b"HTTP/1.1 400 Bad Request")
            await reader.readuntil(b"does not fit the model")
        writer.close()


async def test_a_body_in_time_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_BODY_TIMEOUT_S", 0.2)
    backend = FakeBackend(lambda request: says("x") if request.request_id == "first" else ())
    async with running_face(backend) as face, client_of(face) as client:
        headers = {"x-request-id": "first"}
        assert (await client.post("/v1/completions", json=ASK, headers=headers)).status_code == 200
        late = asyncio.create_task(client.post("/v1/completions", json=ASK))
        await backend.submitted(2)
        await asyncio.sleep(0.3)
        backend.streams[1].feed(says("x"))
        assert (await late).status_code == 200
