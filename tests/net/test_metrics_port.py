"""The port with a process's metrics: small, bounded, and nothing else is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from common.config import StartError
from common.metrics_port import MetricsPort
from tests.ports import free_port


@asynccontextmanager
async def open_port() -> AsyncIterator[tuple[MetricsPort, int]]:
    port, number = MetricsPort(lambda: b"one 1.0\n"), free_port()
    await port.open("127.0.0.1", number)
    try:
        yield port, number
    finally:
        port.close()


async def test_it_shows_the_metrics_and_nothing_else() -> None:
    async with open_port() as (_, number), httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{number}"
        answer = await http.get(f"{url}/metrics?x=1")
        assert (answer.status_code, answer.text) == (200, "one 1.0\n")
        assert answer.headers["content-type"].startswith("text/plain")
        assert (await http.get(f"{url}/")).status_code == 404
        assert (await http.post(f"{url}/metrics", content=b"x")).status_code == 405


async def test_without_a_port_nothing_listens() -> None:
    port = MetricsPort(bytes)
    await port.open("127.0.0.1", 0)
    port.close()


async def test_a_port_that_is_taken_is_named() -> None:
    async with open_port() as (_, number):
        with pytest.raises(StartError, match=f"cannot serve metrics at 127.0.0.1:{number}"):
            await MetricsPort(bytes).open("127.0.0.1", number)


async def cut_off(reader: asyncio.StreamReader) -> None:
    """Without an answer."""
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def ended(writer: asyncio.StreamWriter) -> None:
    """Closed on this side too, whatever the other has done."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def test_a_head_without_an_end_is_cut_off() -> None:
    async with open_port() as (port, number):
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        writer.write(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 16 * 1024)
        await cut_off(reader)
        await ended(writer)
        assert not port.connections


async def test_of_too_many_connections_the_last_is_cut_off() -> None:
    async with open_port() as (port, number):
        open_ones = [await asyncio.open_connection("127.0.0.1", number) for _ in range(16)]
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        await cut_off(reader)
        first_reader, first_writer = open_ones[0]
        first_writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await asyncio.wait_for(first_reader.read(), 10)).endswith(b"one 1.0\n")
        assert len(port.connections) == 15
        for each in [*(opened for _, opened in open_ones), writer]:
            await ended(each)
