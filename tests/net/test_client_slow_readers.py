"""Msgpack clients that ask for answers and do not read them: their connection, as they see it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from common.net import zmq_transport
from kvbaton.codec import encode
from kvbaton.protocol import Done, Generate, Hello
from kvbaton.sockets import HIGH_WATER_MARK
from services.gateway.backend import TokenEvent
from services.gateway.clients.face import ClientFace
from tests.net.gateways import PATIENCE_S, raw_client, running_face
from tests.security.wire_bytes import frame, greeting, ready
from tests.unit.gateway_fakes import FakeBackend, FakeStream, events

SLOW_READER_S = 0.5
BUFFER_BYTES = 4096
MAX_IN_KERNEL = 2_000  # messages, with buffers as small as that
BATCH = 500


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket, and small buffers between it and the face."""
    monkeypatch.setattr(zmq_transport, "SLOW_READER_BUFFER_BYTES", BUFFER_BYTES)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        client.setblocking(False)
        yield client


async def ask(face: ClientFace, client: socket.socket, backend: FakeBackend) -> FakeStream:
    """Say hello and ask for tokens, in ZeroMQ's wire protocol, and read nothing but its opening."""
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", int(face.endpoint.rpartition(":")[2])))
    said = [encode(Hello(protocol_version=1)), encode(Generate(id=1, text="x"))]
    await loop.sock_sendall(client, greeting() + ready())
    opening = b""
    while b"READY" not in opening:
        opening += await loop.sock_recv(client, 65536)
    await loop.sock_sendall(client, b"".join(map(frame, said)))
    await backend.submitted()
    return backend.streams[0]


async def feed_until_cancelled(stream: FakeStream, batch: int, pause_s: float) -> int:
    """So many tokens again and again. Returns how many there were."""
    num_fed = 0
    async with asyncio.timeout(PATIENCE_S):
        while not stream.cancelled.is_set():
            stream.feed([TokenEvent(num_fed + index, 5) for index in range(batch)])
            num_fed += batch
            await asyncio.sleep(pause_s)
    return num_fed


async def read_all(client: socket.socket) -> None:
    """What the kernel had, until there is no more."""
    while await asyncio.get_running_loop().sock_recv(client, 65536):
        pass


async def served(face: ClientFace, backend: FakeBackend) -> None:
    """Another client is, meanwhile."""
    backend.script = lambda _request: events([5, 6])
    async with raw_client(face.endpoint) as honest:
        await honest.hello()
        honest.send(Generate(id=1, text="x"))
        tokens, end = await honest.answers()
    assert (len(tokens), type(end)) == (2, Done)


async def test_who_does_not_read_is_cut_off_after_the_time(client: socket.socket) -> None:
    """Its queue has room for many times what it is sent: the connection ends for its silence."""
    backend = FakeBackend()
    async with running_face(backend, slow_reader_s=SLOW_READER_S) as face:
        stream = await ask(face, client, backend)
        stream.feed([TokenEvent(index, 5) for index in range(MAX_IN_KERNEL)])
        await served(face, backend)
        num_fed = MAX_IN_KERNEL + await feed_until_cancelled(stream, 1, 0.05)
        assert num_fed < HIGH_WATER_MARK // 2
        assert face.num_clients <= 1  # the honest one may not be missed yet
        with pytest.raises(ConnectionError):
            await read_all(client)


async def test_what_waits_for_who_does_not_read_is_bounded(client: socket.socket) -> None:
    backend = FakeBackend()
    async with running_face(backend, slow_reader_s=60) as face:
        stream = await ask(face, client, backend)
        num_fed = await feed_until_cancelled(stream, BATCH, 0)
        num_left = stream._events.qsize()
        assert HIGH_WATER_MARK // 2 < num_fed - num_left < HIGH_WATER_MARK + MAX_IN_KERNEL
        await served(face, backend)


async def test_who_reads_in_time_stays(client: socket.socket) -> None:
    backend = FakeBackend()
    async with running_face(backend, slow_reader_s=SLOW_READER_S) as face:
        stream = await ask(face, client, backend)
        stream.feed(events([5] * MAX_IN_KERNEL))
        received = b""
        async with asyncio.timeout(PATIENCE_S):
            while b"done" not in received[-4096:]:
                received += await asyncio.get_running_loop().sock_recv(client, 65536)
        assert received.count(b"tokens") >= MAX_IN_KERNEL
        assert face.num_clients == 1
