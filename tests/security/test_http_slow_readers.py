"""Clients that ask for streams and do not read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.http import listener
from services.gateway.http.face import HttpFace
from tests.security.http_keys import ASK, client_of
from tests.unit.gateway_fakes import FakeBackend, running_face, says

NUM_SILENT = NUM_SLOW = 25
SLOW_READER_S = 0.3
LONG = says("word " * 2000)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Sockets, and small buffers between them and the server."""
    monkeypatch.setattr(listener, "_SEND_BUFFER_BYTES", 4096)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.socket()) for _ in range(NUM_SILENT + NUM_SLOW)]


async def num_cut_off(face: HttpFace) -> float:
    async with client_of(face) as client:
        text = (await client.get("/metrics")).text
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "kvbaton_http_slow_readers_total"
    ]
    return samples[0].value


async def ask(face: HttpFace, client: socket.socket, more_head: bytes = b"", **values: Any) -> None:
    """As a client that takes little at once."""
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", face.port))
    body = json.dumps({**ASK, **values}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + more_head
    await loop.sock_sendall(client, head + b"content-length: %d\r\n\r\n%s" % (len(body), body))


async def read_byte_by_byte(client: socket.socket) -> None:
    """Until the other end has had enough."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionResetError):
        while await loop.sock_recv(client, 1):  # noqa: ASYNC110 - this is what is slow
            await asyncio.sleep(0.02)


async def test_who_does_not_read_is_cut_off_and_harms_nobody(clients: list[socket.socket]) -> None:
    backend = FakeBackend(lambda _request: LONG)
    async with running_face(backend, slow_reader_s=SLOW_READER_S) as face:
        num_before = await num_cut_off(face)
        for client in clients:
            await ask(face, client, stream=True)
        slow = [asyncio.create_task(read_byte_by_byte(each)) for each in clients[:NUM_SLOW]]
        await backend.submitted(len(clients))
        backend.script = lambda _request: says("one two")
        async with client_of(face) as honest:
            response = await honest.post("/v1/completions", json={**ASK, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
        async with asyncio.timeout(20):
            for stream in backend.streams[: len(clients)]:
                await stream.cancelled.wait()
        assert await num_cut_off(face) - num_before == len(clients)
        # What was not read was not made either.
        assert all(len(left) > len(LONG) / 2 for left in map(_unread, backend.streams[:-1]))
        for task in slow:  # they still have what their kernel has
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


def _unread(stream: object) -> list[object]:
    return list(stream._events._queue)  # type: ignore[attr-defined]


async def test_who_reads_late_but_reads_gets_it_all(clients: list[socket.socket]) -> None:
    backend = FakeBackend(lambda _request: LONG)
    async with running_face(backend, slow_reader_s=30) as face:
        client = clients[0]
        await ask(face, client, stream=True)
        await backend.submitted()
        loop = asyncio.get_running_loop()
        received = b""
        async with asyncio.timeout(20):
            while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
                await asyncio.sleep(0)
                received += await loop.sock_recv(client, 16384)
    assert received.count(b"data: ") == len(LONG) + 1


async def test_an_unread_answer_holds_no_closed_connection(clients: list[socket.socket]) -> None:
    """The whole answer waits in our buffer, and the request is over: the client is cut off too."""
    backend = FakeBackend(lambda _request: LONG)
    async with running_face(backend, slow_reader_s=SLOW_READER_S) as face:
        num_before = await num_cut_off(face)
        await ask(face, clients[0], b"connection: close\r\n", logprobs=2)
        async with asyncio.timeout(20):
            while await num_cut_off(face) == num_before:  # noqa: ASYNC110 - a metric has no event
                await asyncio.sleep(0.05)
