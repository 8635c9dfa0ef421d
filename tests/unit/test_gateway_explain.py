"""Explanations over HTTP: in the answer where they are asked for, and /debug/requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from common.seams import LiveClock
from services.gateway.access.api_keys import ApiKeys, Entry
from services.gateway.http.access import HttpAccess
from services.gateway.observe.recent import Ended, Recent
from tests.unit.explanations import at, served
from tests.unit.gateway_fakes import FakeBackend, running_face, says

BODY = {"model": "demo", "prompt": "def f(", "max_tokens": 8}
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@asynccontextmanager
async def client(
    backend: FakeBackend | None = None, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    backend = backend or FakeBackend(lambda _: says("x = 1"))
    async with (
        running_face(backend, **options) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}") as found,
    ):
        yield found


async def test_a_whole_answer_is_explained_if_that_is_asked_for() -> None:
    async with client() as http:
        answer = await http.post("/v1/completions", json={**BODY, "explain": True, "n": 2})
        (first, second) = answer.json()["kvbaton"]["explanations"]
        assert first["id"] == answer.headers["x-request-id"]
        assert second["id"] == first["id"] + "#1"
        assert first["stages"][0]["name"] == "tokenize"
        assert first["verdict"]["text"]
        timing = answer.headers["server-timing"]
        assert timing.startswith("tokenize;dur=")
        assert ", total;dur=" in timing


async def test_a_stream_is_explained_by_its_last_chunk() -> None:
    async with client() as http:
        answer = await http.post(
            "/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "x"}],
                "stream": True,
                "explain": True,
            },
        )
    *chunks, end = [line[6:] for line in answer.text.splitlines() if line]
    assert end == "[DONE]"
    *others, last = [json.loads(chunk) for chunk in chunks]
    assert last["choices"] == []
    assert "usage" not in last
    (explanation,) = last["kvbaton"]["explanations"]
    assert explanation["id"] == answer.headers["x-request-id"]
    assert not any("kvbaton" in chunk for chunk in others)


async def test_other_answers_are_not_explained() -> None:
    async with client() as http:
        answer = await http.post("/v1/completions", json=BODY)
        assert "kvbaton" not in answer.json()
        assert "server-timing" not in answer.headers


@pytest.mark.parametrize(("given", "taken"), [(TRACEPARENT, TRACEPARENT), ("00-broken", "")])
async def test_a_trace_context_is_taken_up_if_it_is_valid(given: str, taken: str) -> None:
    backend = FakeBackend(lambda _: says("x"))
    async with client(backend) as http:
        answer = await http.post("/v1/completions", json=BODY, headers={"traceparent": given})
    assert answer.status_code == 200
    (request,) = backend.requests
    assert request.traceparent == taken
    assert request.received_at > 0


def kept(*tenants: str) -> Recent:
    recent = Recent()
    for tenant in tenants:
        recent.add(Ended(tenant, f"of-{tenant}", 0, served().timeline, at(200), 1.7e9))
    return recent


async def shown(http: httpx.AsyncClient, key: str) -> list[str]:
    answer = await http.get("/debug/requests", headers={"authorization": f"Bearer {key}"})
    assert answer.headers["content-type"] == "application/json"
    return [each["id"] for each in answer.json()["requests"]]


async def test_the_last_requests_are_shown_to_their_tenant_and_to_operators() -> None:
    def entry(name: str, **more: Any) -> Entry:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return Entry(name=name, tenant=name, sha256=digest, **more)

    # Who shares another's cache sees none of its requests.
    entries = [entry("acme"), entry("guest", share_cache_with="acme"), entry("op", operator=True)]
    access = HttpAccess(ApiKeys(entries, LiveClock().now()))
    async with client(recent=kept("acme", "guest", "acme"), access=access) as http:
        assert await shown(http, "acme") == ["of-acme", "of-acme"]
        assert await shown(http, "guest") == ["of-guest"]
        assert await shown(http, "op") == ["of-acme", "of-guest", "of-acme"]
        assert (await http.get("/debug/requests")).status_code == 401


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "", "1e1", "٣", "9" * 50])
async def test_a_limit_is_a_number_within_bounds(limit: str) -> None:
    async with client() as http:
        answer = await http.get("/debug/requests", params={"limit": limit})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"


async def test_as_many_are_shown_as_asked_for() -> None:
    async with client(recent=kept("a", "b", "c")) as http:
        answer = await http.get("/debug/requests?limit=2")
    assert [each["id"] for each in answer.json()["requests"]] == ["of-c", "of-b"]
