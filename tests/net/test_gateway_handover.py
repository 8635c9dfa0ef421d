"""A gateway that serves an inherited socket leaves, and nobody is refused or cut off."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest

from services.gateway.http.face import HttpFace
from tests.unit.gateway_fakes import FakeBackend, running_face, says

ASK = {"model": "demo", "prompt": "hello"}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """What systemd holds open; each process has a descriptor of its own for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def client_of(face: HttpFace) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=20)


async def test_the_next_process_serves_whoever_connects_meanwhile(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    former, later = FakeBackend(), FakeBackend(lambda _request: says("one two"))
    async with running_face(former, listener=listener.dup()) as face, client_of(face) as client:
        assert face.port == port
        under_way = asyncio.ensure_future(client.post("/v1/completions", json=ASK))
        await former.submitted()
        leaving = asyncio.ensure_future(face.hand_over())
        async with client_of(face) as other:
            waiting = asyncio.ensure_future(other.post("/v1/completions", json=ASK))
            await asyncio.sleep(0.05)
            assert not waiting.done(), "it waits in the socket's queue"
            assert not leaving.done(), "a request is under way"
            async with running_face(later, listener=listener.dup()):
                assert (await waiting).status_code == 200
                former.streams[0].feed(says("three"))
                answer = await under_way
                assert answer.status_code == 200
                assert answer.headers["connection"] == "close"
                await leaving
    assert (len(former.requests), len(later.requests)) == (1, 1)


async def test_a_connection_that_has_not_asked_yet_may_and_an_idle_one_is_closed(
    listener: socket.socket,
) -> None:
    backend = FakeBackend(lambda _request: says("one"))
    async with running_face(backend, listener=listener.dup()) as face:
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", face.port)
        idle_writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await idle_reader.readuntil(b"\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        assert face._server is not None
        while len(face._server.server_state.connections) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        leaving = asyncio.ensure_future(face.hand_over())
        assert await idle_reader.read() == b""
        assert not leaving.done()
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer
        await leaving
        idle_writer.close()
        writer.close()


async def test_a_socket_of_its_own_is_served_to_the_end() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, client_of(face) as client:
        await face.hand_over()
        assert (await client.get("/health")).status_code == 200
