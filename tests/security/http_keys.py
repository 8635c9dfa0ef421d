"""An HTTP face with API keys, and what it is asked in tests."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.gateway.access.api_keys import ApiKeys, Entry
from services.gateway.http.access import HttpAccess
from services.gateway.http.face import HttpFace
from tests.unit.gateway_fakes import FakeBackend, running_face

ASK = {"model": "demo", "prompt": "hello"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


class FakeClock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


def entry(name: str, tenant: str = "", **values: Any) -> Entry:
    """A key that reads like its name."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Entry(name=name, tenant=tenant or name, sha256=digest, **values)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def client_of(face: HttpFace, key: str = "", **options: Any) -> httpx.AsyncClient:
    headers = bearer(key) if key else {}
    url = f"http://127.0.0.1:{face.port}"
    return httpx.AsyncClient(base_url=url, timeout=20, headers=headers, **options)


@asynccontextmanager
async def face_with_keys(
    backend: FakeBackend, *entries: Entry, **options: Any
) -> AsyncIterator[tuple[HttpFace, FakeClock]]:
    clock = FakeClock()
    access = HttpAccess(ApiKeys(list(entries), clock.now()))
    async with running_face(backend, access=access, clock=clock, **options) as face:
        yield face, clock
