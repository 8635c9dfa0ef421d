"""A request with an Idempotency-Key, sent again to another gateway."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from services.gateway.backend import GenerationRequest
from tests.security.http_keys import ASK, CHAT, bearer, client_of, entry, face_with_keys
from tests.unit.gateway_fakes import FakeBackend, Script, events

KEYS = (entry("alice", "acme"), entry("ann", "acme"), entry("bob", "bolt"))
PATHS: dict[str, dict[str, Any]] = {"/v1/completions": ASK, "/v1/chat/completions": CHAT}


def sampled(request: GenerationRequest) -> Script:
    """Tokens that depend on what real ones do: prompt, seed and choice."""
    seed = request.sampling.seed
    assert seed is not None
    first = (sum(request.prompt) + seed + request.choice) % 1000
    return events([10 + (first + index) % 1000 for index in range(5)])


async def answer(path: str, body: dict[str, Any], name: str, key: str | None) -> dict[str, Any]:
    """From a gateway of its own, which may have served others before."""
    backend = FakeBackend(sampled)
    async with face_with_keys(backend, *KEYS) as (face, _), client_of(face, name) as client:
        if name == "ann":
            await client.post("/v1/completions", json={"prompt": "of somebody else"})
        headers = {} if key is None else {"idempotency-key": key}
        response = await client.post(path, json=body, headers=headers)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    assert answer["id"].endswith(response.headers["x-request-id"])
    assert backend.requests[-1].request_id.startswith(response.headers["x-request-id"])
    del answer["created"]
    return answer


@pytest.mark.parametrize(
    ("path", "values"),
    [("/v1/completions", {"n": 3}), ("/v1/completions", {"seed": 7}), ("/v1/chat/completions", {})],
)
async def test_any_gateway_gives_the_same_answer(path: str, values: dict[str, Any]) -> None:
    body = {**PATHS[path], **values}
    first = await answer(path, body, "alice", "key-1")
    assert await answer(path, body, "ann", "key-1") == first  # of the same tenant
    others = [
        await answer(path, body, "alice", "key-2"),
        await answer(path, body, "bob", "key-1"),
        await answer(path, {**body, "user": "x"}, "alice", "key-1"),
        await answer(path, body, "alice", None),
    ]
    for other in others:
        assert other["id"] != first["id"]
        assert (other["choices"] == first["choices"]) is ("seed" in values)


async def test_each_prompt_of_a_request_has_a_seed_of_its_own() -> None:
    backend = FakeBackend(sampled)
    async with face_with_keys(backend, *KEYS) as (face, _), client_of(face, "alice") as client:
        body = {"prompt": ["a", "a"]}
        headers = {"idempotency-key": "k"}
        assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
    first, second = (request.sampling.seed for request in backend.requests)
    assert first != second


@pytest.mark.parametrize("value", ["", "x" * 256, "caf\xe9", "two"])
async def test_what_is_no_key_is_refused(value: str) -> None:
    backend = FakeBackend(sampled)
    async with face_with_keys(backend, *KEYS) as (face, _), client_of(face) as client:
        raw = (b"idempotency-key", value.encode("latin-1"))
        headers = [*bearer("alice").items(), *[raw] * (2 if value == "two" else 1)]
        response: httpx.Response = await client.post(
            "/v1/completions",
            json=ASK,
            headers=httpx.Headers(headers),  # type: ignore[arg-type]
        )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert backend.requests == []
