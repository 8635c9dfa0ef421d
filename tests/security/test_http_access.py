"""API keys: every route without, with a wrong and with another tenant's key; quotas; start-up."""

from __future__ import annotations

import asyncio
import hmac
import math
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.config import StartError
from kvbaton.errors import UnavailableError
from services.gateway.http import face as http
from services.gateway.http.access import OPEN_PATHS, load_access
from tests.security.http_keys import (
    ASK,
    CHAT,
    FakeClock,
    bearer,
    client_of,
    entry,
    face_with_keys,
)
from tests.unit.gateway_fakes import FakeBackend, RefusedError, running_face, says

BODIES = {"/v1/completions": ASK, "/v1/chat/completions": CHAT}
OTHER_BODIES = {
    "/v1/responses": {"model": "demo", "input": "hello"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5]},
    "/abort_requests": {"request_ids": ["alices-id"]},
    "/abort_request": {"abort_all": True},
}
# What tells about all tenants, or is done to all of them.
OPERATORS = {
    "/metrics", "/server_info", "/reset_prefix_cache", "/flush_cache", "/start_profile",
    "/stop_profile",
}  # fmt: skip
ABSENT = {"/v1/embeddings"}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[Route]:
    """The routes of the next face, and one more, as if somebody had added it."""
    found: list[Route] = []

    class Watched(Starlette):
        def __init__(self, routes: list[Route], **options: object) -> None:
            found.extend([*routes, Route("/added", _added, methods=["GET"])])
            super().__init__(routes=found, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(http, "Starlette", Watched)
    return found


async def _added(_request: Request) -> Response:
    return Response()


async def ask(client: httpx.AsyncClient, route: Route, headers: dict[str, str]) -> httpx.Response:
    assert route.methods is not None
    path = route.path.replace("{model:path}", "demo")
    method = "POST" if "POST" in route.methods else "GET"
    return await client.request(
        method, path, json=(BODIES | OTHER_BODIES).get(path), headers=headers
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("mallory"),
        {"authorization": "Bearer"},
        {"authorization": "alice"},
        {"authorization": "Basic alice"},
        {"x-api-key": "alice"},
    ],
)
async def test_every_route_but_health_is_closed(
    routes: list[Route], headers: dict[str, str]
) -> None:
    backend = FakeBackend(lambda _request: says("x"))
    async with face_with_keys(backend, entry("alice")) as (face, _), client_of(face) as client:
        assert {route.path for route in routes} > {*OPEN_PATHS, "/metrics", "/ready", "/added"}
        for route in routes:
            response = await ask(client, route, headers)
            if route.path in OPEN_PATHS:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, route.path
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["code"], error["type"]) == (401, "Unauthorized")
        for path in ("/nowhere", "/health/", "/%2Fhealth", "/Health", "/v1/../health/x"):
            assert (await client.get(path, headers=headers)).status_code == 401, path
    assert backend.requests == []


async def test_two_keys_in_one_request_are_none() -> None:
    headers = [("authorization", "Bearer alice")] * 2
    async with (
        face_with_keys(FakeBackend(), entry("alice")) as (face, _),
        client_of(face) as client,
    ):
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_every_route_shows_nothing_of_another_tenant(routes: list[Route]) -> None:
    backend = FakeBackend(lambda _request: says("secret-answer"))
    keys = (entry("alice", "acme"), entry("bob", "bolt"), entry("root", operator=True))
    async with face_with_keys(backend, *keys) as (face, _), client_of(face) as client:
        for body in (ASK, {**ASK, "stream": True}):
            headers = {**bearer("alice"), "x-request-id": "alices-id"}
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200
        backend.script = lambda _request: says("x")
        for route in routes:
            response = await ask(client, route, bearer("bob"))
            status = 403 if route.path in OPERATORS else 501 if route.path in ABSENT else 200
            assert response.status_code == status, route.path
            for word in (b"alice", b"acme", b"secret", b"alices-id"):
                assert word not in response.content, route.path
        assert (await client.get("/metrics", headers=bearer("root"))).status_code == 200


@pytest.mark.parametrize(
    ("key", "num_aborted"), [("bob", 0), ("mallory", 0), ("ann", 1), ("root", 1)]
)
@pytest.mark.parametrize(
    ("path", "body"),
    [("/abort_requests", {"request_ids": ["hers"]}), ("/abort_request", {"abort_all": True})],
)
async def test_only_ones_own_answers_can_be_ended(
    path: str, body: dict[str, object], key: str, num_aborted: int
) -> None:
    backend = FakeBackend()
    keys = (
        entry("alice", "acme"), entry("ann", "acme"), entry("bob", "bolt"),
        entry("mallory", share_cache_with="acme"), entry("root", operator=True),
    )  # fmt: skip
    async with face_with_keys(backend, *keys) as (face, _), client_of(face) as client:
        headers = {**bearer("alice"), "x-request-id": "hers"}
        task = asyncio.create_task(client.post("/v1/completions", json=ASK, headers=headers))
        await backend.submitted()
        response = await client.post(path, json=body, headers=bearer(key))
        assert response.json() == {"num_aborted": num_aborted}
        backend.streams[0].feed(says("x"))
        assert (await task).status_code == (499 if num_aborted else 200)


async def test_each_tenant_has_a_cache_of_its_own_unless_told_to_share() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    keys = (
        entry("alice", "acme"),
        entry("ann", "acme"),
        entry("bob", "bolt"),
        entry("bea", "bee", share_cache_with="acme"),
    )
    async with face_with_keys(backend, *keys) as (face, _), client_of(face) as client:
        for name in ("alice", "ann", "bob", "bea"):
            for path, body in BODIES.items():
                response = await client.post(path, json=body, headers=bearer(name))
                assert response.status_code == 200
    tenants = [request.tenant for request in backend.requests]
    assert tenants == ["acme"] * 4 + ["bolt"] * 2 + ["acme"] * 2


async def test_without_keys_everybody_is_one_tenant() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    async with running_face(backend) as face, client_of(face, "whatever") as client:
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    assert backend.requests[0].tenant == ""


async def test_all_keys_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    num_compared = 0
    compare_digest = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        nonlocal num_compared
        num_compared += 1
        return compare_digest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = [entry(f"key-{number}") for number in range(5)]
    async with face_with_keys(FakeBackend(), *keys) as (face, _), client_of(face) as client:
        for name in ("key-0", "key-4", "none"):
            num_compared = 0
            await client.get("/v1/models", headers=bearer(name))
            assert num_compared == 5


async def test_requests_beyond_the_rate_are_refused_by_name() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    keys = (entry("alice", requests_per_minute=2), entry("bob"))
    async with face_with_keys(backend, *keys) as (face, clock), client_of(face) as client:

        async def post(name: str) -> httpx.Response:
            return await client.post("/v1/completions", json=ASK, headers=bearer(name))

        assert [(await post("alice")).status_code for _ in range(2)] == [200, 200]
        refused = await post("alice")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "30"
        error = refused.json()["error"]
        assert error["type"] == "RateLimitError"
        assert "limit of requests_per_minute = 2: try again in 30 s" in error["message"]
        assert (await post("bob")).status_code == 200
        clock.time += 30
        assert [(await post("alice")).status_code for _ in range(2)] == [200, 429]


async def test_tokens_are_set_aside_and_what_is_not_used_comes_back() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    prompt = [5] * 10
    keys = entry("alice", tokens_per_minute=100)
    async with face_with_keys(backend, keys) as (face, clock), client_of(face, "alice") as client:

        async def post(**values: object) -> httpx.Response:
            body = {"prompt": prompt, "max_tokens": 20, **values}
            return await client.post("/v1/completions", json=body)

        used = len(prompt) + len(says("x"))
        for left in range(100, 70, -used):  # not 30, which is set aside while it runs
            assert left >= 30
            assert (await post()).status_code == 200
        backend.script = lambda _request: [RefusedError(UnavailableError("nobody is there"))]
        assert (await post(max_tokens=5)).status_code == 503  # and all comes back
        backend.script = lambda _request: says("x")
        refused = await post(n=3)  # 10 + 3 * 20 tokens
        assert refused.status_code == 429
        message = refused.json()["error"]["message"]
        assert "limit of tokens_per_minute = 100" in message
        clock.time += float(refused.headers["retry-after"])
        assert (await post(n=3)).status_code == 200
        clock.time += 60
        # More than the limit at once: it passes alone, and leaves a debt.
        backend.script = lambda _request: ()
        num_before = len(backend.streams)
        large = asyncio.create_task(post(n=6))
        await backend.submitted(num_before + 1)
        assert (await post()).headers["retry-after"] == str(math.ceil((30 + 30) * 60 / 100))
        backend.streams[num_before].feed(says("x"))
        await backend.submitted(num_before + 6)
        for stream in backend.streams[num_before + 1 :]:
            stream.feed(says("x"))
        assert (await large).status_code == 200
        backend.script = lambda _request: says("x")
        assert (await post()).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example"])
def test_others_are_let_in_only_with_keys_or_on_purpose(host: str, tmp_path: Path) -> None:
    def load(**values: str | bool) -> object:
        settings = {"api_keys": "", "tls_cert": "", "tls_key": "", "open_http": False, **values}
        return load_access(host=host, clock=FakeClock(), **settings)  # type: ignore[arg-type]

    with pytest.raises(StartError, match=r"without --api-keys .* --open-http"):
        load()
    load(open_http=True)
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text(f'[[key]]\nname = "a"\ntenant = "t"\nsha256 = "{"0" * 64}"\n')
    load(api_keys=str(file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nothing_is_needed(host: str) -> None:
    access = load_access(
        host=host, api_keys="", tls_cert="", tls_key="", open_http=False, clock=FakeClock()
    )
    assert (access.keys, access.tls) == (None, None)
