"""Bytes that no honest client sends, and bodies beyond every limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from services.gateway.http import server as http_server
from services.gateway.http.face import HttpFace
from services.gateway.http.openai import body as bodies
from services.gateway.http.openai.body import MAX_BODY_BYTES
from tests.unit.gateway_fakes import FakeBackend, running_face, says

JSON = {"content-type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def exchange(face: HttpFace, *parts: bytes) -> bytes:
    """Send bytes, and read until the server closes or resets the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
    answer = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            for part in parts:
                writer.write(part)
                await writer.drain()
            while piece := await reader.read(65536):
                answer += piece
    writer.close()
    return answer


def status_and_type(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1.1 (\d+)", head)
    assert status
    return int(status[1]), json.loads(body)["error"]["type"]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"x: a\r\n b: c\x00\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused(raw: bytes) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face:
        assert status_and_type(await exchange(face, raw)) == (400, "BadRequestError")
    assert backend.requests == []


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /health HTTP/1.1\r\nx: ", b"a"),
        (b"GET /", b"a"),
        (b"GET /health HTTP/1.1\r\n", b"x: a\r\n"),
    ],
)
async def test_a_head_has_a_limit(begin: bytes, more: bytes) -> None:
    head = (begin + more * http_server._MAX_HEAD_BYTES)[: http_server._MAX_HEAD_BYTES + 1]
    async with running_face(FakeBackend()) as face:
        assert status_and_type(await exchange(face, head)) == (431, "RequestHeaderFieldsTooLarge")


@pytest.mark.parametrize(
    "tail",
    [b"1;" + b"x" * 200_000, b"0\r\nx: " + b"a" * 200_000, b"0\r\n" + b"x: a\r\n" * 40_000],
)
async def test_chunk_extensions_and_trailers_have_a_limit(tail: bytes) -> None:
    """They come when an answer may be under way: the connection ends without another."""
    async with running_face(FakeBackend()) as face:
        head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        assert await exchange(face, head, tail) == b""


async def test_a_head_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HEAD_TIMEOUT_S", 0.02)
    async with running_face(FakeBackend()) as face:
        assert status_and_type(await exchange(face, b"GET /heal")) == (408, "RequestTimeout")
        assert await exchange(face) == b""


async def test_a_body_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_TIMEOUT_S", 0.02)
    async with running_face(FakeBackend()) as face:
        answer = await exchange(face, HEAD + b"content-length: 10\r\n\r\n{")
        assert status_and_type(answer) == (408, "RequestTimeout")


def chunks_of(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // 65536):
        yield b"x" * 65536


async def chunked(num_bytes: int) -> AsyncIterator[bytes]:
    for chunk in chunks_of(num_bytes):
        yield chunk


@pytest.mark.parametrize("declared", [True, False])
async def test_too_large_a_body_is_refused_while_it_comes(declared: bool) -> None:
    num_bytes = MAX_BODY_BYTES + 65536
    content = b"x" * num_bytes if declared else chunked(num_bytes)
    async with running_face(FakeBackend()) as face:
        url = f"http://127.0.0.1:{face.port}/v1/completions"
        async with httpx.AsyncClient() as client:
            response = await client.post(url, content=content, headers=JSON)
    assert response.status_code == 413
    assert f"limit of {MAX_BODY_BYTES} bytes" in response.json()["error"]["message"]


async def test_a_body_without_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(bodies, "_MAX_DRAINED_BYTES", 2000)
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    async with running_face(FakeBackend()) as face:
        head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        answer = await exchange(face, head + chunk * 3)
    assert status_and_type(answer) == (413, "RequestEntityTooLarge")


async def test_a_declared_length_is_refused_before_the_body_when_the_client_asks() -> None:
    async with running_face(FakeBackend()) as face:
        head = HEAD + b"content-length: %d\r\n" % (MAX_BODY_BYTES + 1)
        answer = await exchange(face, head + b"expect: 100-continue\r\n\r\n")
        assert status_and_type(answer) == (413, "RequestEntityTooLarge")
        answer = await exchange(face, HEAD + b"content-length: 999999999999\r\n\r\n")
        assert status_and_type(answer) == (413, "RequestEntityTooLarge")


async def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MAX_HELD_BYTES", 1000)
    backend = FakeBackend(lambda _request: says("x"))
    async with running_face(backend) as face:
        url = f"http://127.0.0.1:{face.port}/v1/completions"
        async with httpx.AsyncClient() as client:
            for _ in range(3):
                large = {"prompt": "x" * 1000}
                assert (await client.post(url, json=large)).status_code == 429
                small = {"prompt": "x" * 900}  # what was held is free again
                assert (await client.post(url, json=small)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"content-type": "text/plain"}, "application/json"),
        ({}, "application/json"),
        ({**JSON, "content-encoding": "gzip"}, "Content-Encoding"),
    ],
)
async def test_other_media_types_are_refused(headers: dict[str, str], words: str) -> None:
    async with running_face(FakeBackend()) as face:
        url = f"http://127.0.0.1:{face.port}/v1/completions"
        async with httpx.AsyncClient() as client:
            response = await client.post(url, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert words in response.json()["error"]["message"]


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_face(FakeBackend()) as face:
        answer = await exchange(
            face,
            b"GET /health HTTP/1.1\r\nx-request-id: a\r\n\r\n"
            b"GET /none HTTP/1.1\r\nx-request-id: b\r\nconnection: close\r\n\r\n",
        )
    assert re.findall(rb"HTTP/1.1 (\d+)|x-request-id: (\w)", answer) == [
        (b"200", b""), (b"", b"a"), (b"404", b""), (b"", b"b"),
    ]  # fmt: skip


async def test_a_head_with_an_upgrade_is_an_ordinary_request() -> None:
    async with running_face(FakeBackend()) as face:
        answer = await exchange(
            face,
            b"GET /health HTTP/1.1\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n",
        )
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_garbage_after_a_request_does_not_get_into_its_answer() -> None:
    backend = FakeBackend()
    body = b'{"prompt": "x", "stream": true}'
    async with running_face(backend) as face:
        request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        writer.write(request)
        await backend.submitted()
        backend.streams[0].feed(says("one two")[:1])
        await reader.readuntil(b'"one"')
        writer.write(b"\x00\x00 garbage\r\n\r\n")
        rest = await reader.read()
        writer.close()
        async with asyncio.timeout(5):
            await backend.streams[0].cancelled.wait()
    assert b"HTTP/1.1" not in rest


async def test_many_tiny_prompts_are_refused_before_they_are_built() -> None:
    body = b'{"prompt": [' + b"[1]," * 500_000 + b"[1]]}"
    async with running_face(FakeBackend()) as face:
        url = f"http://127.0.0.1:{face.port}/v1/completions"
        async with httpx.AsyncClient() as client:
            response = await client.post(url, content=body, headers=JSON)
    assert response.status_code == 400
    assert "at most 128 choices" in response.json()["error"]["message"]
