"""What operators and routers ask of the HTTP face beside generation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from kvbaton.errors import UnavailableError
from services.gateway.backend import GenerationRequest
from tests.unit.gateway_fakes import (
    FakeBackend,
    RefusedError,
    Script,
    demo_model,
    running_face,
    says,
)

ASK = {"prompt": "hello"}
TEXT = "def f(): # größe"


@asynccontextmanager
async def client_of(backend: FakeBackend, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running_face(backend, **options) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=20) as client,
    ):
        yield client


async def test_texts_become_tokens_and_texts_again() -> None:
    async with client_of(FakeBackend()) as client:
        answer = (await client.post("/tokenize", json={"prompt": TEXT})).json()
        tokens = demo_model().encode(TEXT)
        assert answer == {
            "count": len(tokens), "max_model_len": 2048, "tokens": tokens, "token_strs": None,
        }  # fmt: skip
        ask = {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
        bare = (await client.post("/tokenize", json=ask)).json()
        assert bare["tokens"] == tokens[1:]
        assert len(bare["token_strs"]) == bare["count"]
        answer = (await client.post("/detokenize", json={"tokens": bare["tokens"]})).json()
    assert answer == {"prompt": TEXT}


async def test_a_conversation_becomes_the_tokens_that_a_chat_has() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    async with client_of(backend) as client:
        tool = {"type": "function", "function": {"name": "f", "description": "Counts."}}
        for more in ({}, {"add_generation_prompt": False}, {"tools": [tool]}):
            tokens = (await client.post("/tokenize", json={**ask, **more})).json()["tokens"]
            await client.post("/v1/chat/completions", json={**ask, **more})
            assert backend.requests[-1].prompt == tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x" * 1_000_000}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": 5}]}, 400, "messages[0].role"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [2048]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
        ("/abort_requests", {}, 400, "request_ids"),
        ("/abort_requests", {"request_ids": ["x"] * 1025}, 400, "request_ids"),
        ("/abort_request", {}, 400, "rid"),
    ],
)
async def test_wrong_questions_are_refused_by_field(
    path: str, body: dict[str, Any], status: int, field: str
) -> None:
    async with client_of(FakeBackend()) as client:
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, field)


async def test_the_load_is_what_is_under_way() -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        assert (await client.get("/load")).json() == {"server_load": 0}
        asks = [asyncio.create_task(client.post("/v1/completions", json=ASK)) for _ in range(2)]
        await backend.submitted(2)
        assert (await client.get("/load")).json() == {"server_load": 2}
        for stream in backend.streams:
            stream.feed(says("x"))
        await asyncio.gather(*asks)
        assert (await client.get("/load")).json() == {"server_load": 0}


async def test_the_server_tells_of_itself() -> None:
    async with client_of(FakeBackend()) as client:
        info = (await client.get("/server_info")).json()
    assert (info["model"], info["max_model_len"], info["ready"]) == ("demo", 2048, True)
    assert info["stats"] == {"fake_requests": 0.0}


def _fails(failure: Exception, _request: GenerationRequest) -> Script:
    return [failure]


async def test_health_is_shown_by_a_token() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    async with client_of(backend) as client:
        assert (await client.get("/health_generate")).status_code == 200
        assert backend.requests[0].sampling.max_tokens == 1
        for failure in (UnavailableError("gone"), RefusedError(UnavailableError("gone"))):
            backend.script = partial(_fails, failure)
            response = await client.get("/health_generate")
            assert response.status_code == 503
            assert "gone" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/abort_requests", {"request_ids": ["cmpl-mine", "unknown"]}),
        ("/abort_requests", {"request_ids": ["mine"]}),
        ("/abort_request", {"rid": "mine"}),
        ("/abort_request", {"abort_all": True}),
    ],
)
@pytest.mark.parametrize("has_begun", [False, True])
async def test_an_answer_can_be_ended(path: str, body: dict[str, Any], has_begun: bool) -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        ask = {**ASK, "stream": True}
        headers = {"x-request-id": "mine"}
        task = asyncio.create_task(client.post("/v1/completions", json=ask, headers=headers))
        await backend.submitted()
        if has_begun:
            backend.streams[0].feed(says("one two")[:1])
            await asyncio.sleep(0)
        assert (await client.post(path, json=body)).json() == {"num_aborted": 1}
        response = await task
        assert backend.streams[0].num_cancels >= 1
        assert (await client.get("/load")).json() == {"server_load": 0}
    if response.status_code == 200:
        *_, error, done = response.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        found = json.loads(error.removeprefix("data: "))["error"]
    else:
        found = response.json()["error"]
    assert found["type"] == "ClientClosedRequest"
    assert "aborted" in found["message"]


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/flush_cache"])
async def test_the_cache_can_be_dropped_but_not_by_a_web_page(path: str) -> None:
    num_calls = 0

    async def drop_cache() -> int:
        nonlocal num_calls
        num_calls += 1
        return 7

    async with client_of(FakeBackend(), drop_cache=drop_cache) as client:
        response = await client.post(path)
        assert (response.status_code, response.json()) == (200, {"num_blocks": 7})
        own = f"http://{client.base_url.host}:{client.base_url.port}"
        assert (await client.post(path, headers={"origin": own})).status_code == 200
        other = await client.post(path, headers={"origin": "http://evil.example"})
        assert other.status_code == 403
    assert num_calls == 2
    async with client_of(FakeBackend()) as client:
        assert (await client.post(path)).status_code == 501
