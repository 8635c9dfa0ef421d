"""The examples of docs/client.md and of the README run as they stand, and no option is left out."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbaton.client import AsyncClient
from kvbaton.request import RequestOptions
from kvbaton.sync_client import Client
from tests.net.gateways import PATIENCE_S, running_face
from tests.unit.gateway_fakes import FakeBackend, says

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLES = [
    example
    for document in (DOCUMENT, README, PROTOCOL)
    for example in re.findall(r"^```python\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL)
    if "from kvbaton import" in example
]
CALL = '<tool_call>{"name": "temperature", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A gateway, on a thread of its own, where every answer is a call of a tool."""
    is_ready, endpoints = threading.Event(), []
    stopping: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()
        stopping.append((asyncio.get_running_loop(), stop))
        async with running_face(FakeBackend(lambda _: says(CALL, stops=True))) as face:
            endpoints.append(face.endpoint)
            is_ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert is_ready.wait(PATIENCE_S)
    yield endpoints[0]
    loop, stop = stopping[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(endpoint: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tcp://127.0.0.1:5555" in example
    here = example.replace("tcp://127.0.0.1:5555", endpoint).replace('".run/keys"', '""')
    exec(here, {"__name__": "example"})
    assert capsys.readouterr().out


def test_there_are_examples_of_every_method() -> None:
    for name in ("generate", "finish", "score", "tokenize", "detokenize", "models", "connect"):
        assert any(f".{name}(" in example for example in EXAMPLES), name


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    assert all(getattr(Client, name).__doc__ for name in public(Client))
    assert all(f"`{name}" in DOCUMENT or f".{name}(" in DOCUMENT for name in public(Client))


def test_every_option_is_a_field_of_the_protocol() -> None:
    for name in RequestOptions.__annotations__.keys() - {"deadline_s"}:
        assert f"| `{name}` |" in PROTOCOL, name
