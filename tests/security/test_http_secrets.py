"""Neither logs, metrics nor error bodies hold prompts, answers or keys."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from kvbaton.errors import UnavailableError
from services.gateway.backend import GenerationRequest
from tests.security.http_keys import bearer, client_of, entry, face_with_keys
from tests.unit.gateway_fakes import FakeBackend, RefusedError, Script, says

PROMPT, ANSWER, KEY, ONCE = "marzipan", "tangerine", "kvb-hazelnut", "once-pistachio"
SECRETS = (PROMPT, ANSWER, KEY, ONCE)
TEXT = {"prompt": PROMPT}
CHAT = {"messages": [{"role": "user", "content": PROMPT}]}

# What is asked, and what comes of it.
REQUESTS: list[tuple[dict[str, Any], int]] = [
    (TEXT, 200),
    ({**TEXT, "stream": True}, 200),
    ({**TEXT, "seed": 1}, 503),
    ({**TEXT, "seed": 2}, 500),
    ({**TEXT, "seed": 3, "stream": True}, 200),  # fails on the way
    ({**TEXT, "temperature": 999}, 400),
    ({**TEXT, "colour": PROMPT}, 200),
    ({**TEXT, "stop": [PROMPT] * 17}, 400),
    ({**TEXT, "stop": {"a": PROMPT}}, 400),
    ({**TEXT, "suffix": PROMPT}, 400),
    ({"prompt": PROMPT * 5000}, 400),
    ({"prompt": {"a": PROMPT}}, 400),
    ({**TEXT, "model": "other"}, 404),
    ({"prompt": [PROMPT, 5]}, 400),
    (CHAT, 200),
    ({**CHAT, "stream": True}, 200),
    ({"messages": [{"role": 5, "content": PROMPT}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": PROMPT}]}]}, 400),
    ({**CHAT, "chat_template": PROMPT}, 400),
    ({**CHAT, "tools": [{"name": PROMPT}]}, 400),
]


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """All that would be written to stderr."""
    former, written = structlog.get_config(), io.StringIO()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(written),
    )
    yield written
    structlog.configure(**former)


def script(request: GenerationRequest) -> Script:
    failures: dict[int | None, Script] = {
        1: [RefusedError(UnavailableError("nobody is there"))],
        2: [ZeroDivisionError("a defect")],
        3: [*says(ANSWER)[:1], UnavailableError("lost on the way")],
    }
    return failures.get(request.sampling.seed, says(ANSWER))


async def test_secrets_are_nowhere(logs: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(script)
    keys = (
        entry(KEY, "acme"),
        entry(KEY + "-slow", "acme", requests_per_minute=1),
        entry(KEY + "-root", "ops", operator=True),
    )
    shown = []
    async with face_with_keys(backend, *keys) as (face, _), client_of(face) as client:

        async def post(body: dict[str, Any], key: str) -> httpx.Response:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            headers = {**bearer(key), "idempotency-key": ONCE}
            response = await client.post(path, json=body, headers=headers)
            if response.status_code >= 400:
                shown.append(response.text)
            shown.append(str(response.headers))
            return response

        for body, status in REQUESTS:
            assert (await post(body, KEY)).status_code == status, body
        limited = [(await post(TEXT, KEY + "-slow")).status_code for _ in range(2)]
        assert limited == [200, 429]
        assert (await post(TEXT, KEY + "-wrong")).status_code == 401
        raw = [PROMPT.encode(), b'{"prompt": "' + PROMPT.encode(), b"\xff" + PROMPT.encode()]
        for content in raw:
            headers = {**bearer(KEY), "content-type": "application/json"}
            response = await client.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 400
            shown.append(response.text)
        response = await client.get(f"/{PROMPT}?key={KEY}", headers=bearer(KEY))
        assert response.status_code == 404  # which names the path that the client itself gave
        metrics = await client.get("/metrics", headers=bearer(KEY + "-root"))
        assert 'status="429"' in metrics.text
        shown.append(metrics.text)
    assert "http_request_failed" in logs.getvalue()
    assert "unknown_fields_ignored" in logs.getvalue()
    for secret in SECRETS:
        for text in (logs.getvalue(), caplog.text, *shown):
            assert secret not in text
