"""docs/http-api.md names every path, field and error of the HTTP API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from services.gateway.http import face as http
from services.gateway.http.openai import errors
from services.gateway.http.openai.schema import (
    IGNORED_FIELDS,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
)
from services.gateway.http.openai.unsupported import CHAT_FIELDS
from tests.unit.gateway_fakes import FakeBackend, running_face

DOCUMENT = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"`([^`\n]+)`", DOCUMENT))


def test_every_field_is_in_the_document() -> None:
    for kind in (CompletionRequest, ChatRequest, StreamOptions):
        assert set(kind.__struct_fields__) <= NAMES
    assert IGNORED_FIELDS | CHAT_FIELDS.names <= NAMES


def test_every_error_is_in_the_document() -> None:
    rows = dict(re.findall(r"(?m)^\| (\d{3}) \| `(\w+)` \|", DOCUMENT))
    types = {str(status): name for status, name in errors.TYPES.items() if status != 422}
    assert rows == types


async def test_every_path_is_in_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Route] = []

    class Watched(Starlette):
        def __init__(self, routes: list[Route], **options: object) -> None:
            found.extend(routes)
            super().__init__(routes=routes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(http, "Starlette", Watched)
    async with running_face(FakeBackend()):
        pass
    paths = {route.path.replace("{model:path}", "{id}") for route in found}
    assert len(paths) > 20
    assert {path for path in paths if not path.startswith("/page/")} <= NAMES
