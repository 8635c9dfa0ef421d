"""AsyncClient against a gateway that restarts, falls silent or misbehaves: see also test_resume."""

from __future__ import annotations

import pytest

from kvbaton import AsyncClient
from kvbaton.errors import ConnectionLostError, InvalidRequestError, ProtocolError
from kvbaton.protocol import (
    HELLO_REQUIRED,
    Error,
    Generate,
    Hello,
    Ping,
    Pong,
    Token,
    Tokens,
    Welcome,
)
from tests.net.gateways import running_face, scripted_gateway
from tests.unit.gateway_fakes import FakeBackend, events

QUICK_S = 0.02


async def test_without_time_to_resume_a_lost_gateway_fails_what_is_in_flight() -> None:
    backend = FakeBackend(lambda _: events([5]))
    silent = FakeBackend()
    async with running_face(silent, instance_id="instance-1") as face:
        endpoint = face.endpoint
        client = AsyncClient(endpoint, resume_s=0)
        assert (await client.connect()).instance_id == "instance-1"
        stream = client.generate("x")
        await silent.submitted()
        face._socket.close()  # as a crash: without a word
        with pytest.raises(ConnectionLostError, match=r"the connection to tcp:.* ended"):
            await anext(stream)
    async with running_face(backend, endpoint=endpoint, instance_id="instance-2"):
        assert (await client.connect()).instance_id == "instance-2"
        assert len([token async for token in client.generate("x")]) == 1
        await client.close()


async def test_a_request_that_meets_a_restarted_gateway_is_served_by_it() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(FakeBackend()) as face:
        endpoint = face.endpoint
        client = AsyncClient(endpoint)
        await client.connect()
    async with running_face(backend, endpoint=endpoint, instance_id="instance-2"):
        streams = [client.generate("x") for _ in range(3)]
        assert [len([token async for token in stream]) for stream in streams] == [1, 1, 1]
        await client.close()


async def test_a_silent_gateway_is_given_up_and_greeted_by_another_connection() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint, ping_interval_s=QUICK_S)
        stream = client.generate("x")
        await gateway.welcome()
        first_peer = gateway.peer
        while not isinstance(await gateway.receive(), Hello) or gateway.peer == first_peer:
            pass
        gateway.send(Welcome(protocol_version=1, instance_id="instance-1", model="demo"))
        assert isinstance(await gateway.receive(), Generate)
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        assert (await anext(stream)).token_id == 5
        await client.close()


async def test_without_time_to_resume_a_silent_gateway_fails_what_is_in_flight() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint, ping_interval_s=QUICK_S, resume_s=0)
        stream = client.generate("x")
        await gateway.welcome()
        with pytest.raises(ConnectionLostError, match="no sign of life from the gateway at tcp:"):
            await anext(stream)
        await client.close()


async def test_a_quiet_gateway_that_answers_pings_is_kept() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint, ping_interval_s=QUICK_S)
        stream = client.generate("x")
        await gateway.welcome()
        assert isinstance(await gateway.receive(), Generate)
        for _ in range(6):
            assert isinstance(await gateway.receive(), Ping)
            gateway.send(Pong(instance_id="instance-1"))
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        assert (await anext(stream)).token_id == 5
        await client.close()


async def test_a_gateway_that_has_forgotten_the_client_gets_a_hello_and_the_request_again() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        first = await gateway.receive()
        gateway.send(Error(code=HELLO_REQUIRED, message="say hello first", id=1))
        await gateway.welcome("instance-2")
        assert await gateway.receive() == first
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        assert (await anext(stream)).token_id == 5
        await client.close()


async def test_a_refused_hello_fails_the_connection_in_words() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        assert isinstance(await gateway.receive(), Hello)
        gateway.send(Error(code="protocol_error", message="version 1 is no longer spoken"))
        with pytest.raises(ProtocolError, match="version 1 is no longer spoken"):
            await anext(stream)
        await client.close()


@pytest.mark.parametrize("frames", [[b"\xc1"], [b""], [b"\x81\xa4type\xa4ping"], [b"", b""]])
async def test_a_gateway_that_talks_nonsense_fails_the_requests(frames: list[bytes]) -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        gateway.send_frames(frames)
        with pytest.raises(ProtocolError):
            await anext(stream)
        await client.close()


async def test_messages_about_unknown_requests_are_ignored() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        gateway.send(Tokens(id=99, tokens=[Token(index=0, token_id=7)]))
        gateway.send(Error(id=99, code="cancelled", message="late"))
        gateway.send(Error(id=1, code="invalid_request", message="this one"))
        with pytest.raises(InvalidRequestError, match="this one"):
            await anext(stream)
        await client.close()
