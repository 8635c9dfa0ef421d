"""/openapi.json, and what a server does with all that it says may come: schemathesis asks it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from services.gateway.backend import GenerationRequest, TokenEvent
from tests.unit.gateway_fakes import FakeBackend, running_face, says

NOT_IMPLEMENTED = 501  # said on purpose: there is no such thing here


def answers(request: GenerationRequest) -> list[TokenEvent]:
    most = request.sampling.max_tokens or 8
    return says("hello world, hello world", stops=True)[-min(most, 8) :]


async def test_every_route_is_described() -> None:
    async with running_face(FakeBackend()) as face:
        url = f"http://127.0.0.1:{face.port}/openapi.json"
        async with httpx.AsyncClient() as client:
            document = (await client.get(url)).json()
    paths = document["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["type"] == "object"
        assert "text/event-stream" in paths[path]["post"]["responses"]["200"]["content"]
    assert {"/health", "/metrics", "/v1/models", "/v1/models/{model}"} <= paths.keys()
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert all(field for name, field in properties.items() if name in ("tools", "response_format"))
    assert "." not in "".join(document["components"]["schemas"])


async def no_server_errors(paths: str, num_examples: int) -> int:
    """Ask each operation so many times. Returns how many answers there were."""
    statuses: list[tuple[str, int]] = []
    async with running_face(FakeBackend(answers)) as face:
        url = f"http://127.0.0.1:{face.port}"
        async with httpx.AsyncClient() as client:
            document = (await client.get(f"{url}/openapi.json")).json()
        schema = schemathesis.openapi.from_dict(document).include(path_regex=paths)
        schema.validate()
        for operation in schema.get_all_operations():
            check = _check(operation.ok(), url, num_examples, statuses)  # type: ignore[union-attr]
            await asyncio.to_thread(check)
    failed = [each for each in statuses if each[1] >= 500 and each[1] != NOT_IMPLEMENTED]
    assert failed == []
    return len(statuses)


def _check(
    operation: Any, url: str, num_examples: int, statuses: list[tuple[str, int]]
) -> Callable[[], None]:
    @settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        answer = case.call(base_url=url, timeout=20)
        statuses.append((operation.path, answer.status_code))

    return ask


async def test_schemathesis_finds_no_server_error() -> None:
    assert await no_server_errors("^/(v1/[a-z/]*s$|tokenize)", 3) > 10


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_schemathesis_finds_no_server_error_in_many() -> None:
    assert await no_server_errors(".", 300) > 2000
