"""The msgpack face on real ZeroMQ, seen by a client that speaks the protocol by hand."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.protocol import (
    CLIENT_TIMEOUT_S,
    MAX_REQUESTS_IN_FLIGHT,
    Cancel,
    Done,
    Error,
    Generate,
    Hello,
    Ping,
    Pong,
    Tokens,
    Welcome,
)
from services.gateway.backend import TokenEvent
from tests.net.gateways import FakeClock, raw_client, running_face
from tests.unit.gateway_fakes import FakeBackend, events


async def test_hello_is_answered_by_welcome() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        assert await client.hello() == Welcome(
            protocol_version=1, instance_id="instance-1", model="demo", max_model_len=2048
        )
        assert await client.ask(Ping()) == Pong(instance_id="instance-1")
        assert face.num_clients == 1


async def test_another_protocol_version_is_refused_in_words() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        assert await client.ask(Hello(protocol_version=2)) == Error(
            code="protocol_error",
            message="protocol version 2 is not supported, this gateway speaks 1",
            field="protocol_version",
        )
        assert face.num_clients == 0


async def test_whoever_has_not_said_hello_is_asked_to() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        for message, request_id in (
            (Generate(id=5, text="x"), 5),
            (Cancel(id=5), None),
            (Ping(), None),
        ):
            assert await client.ask(message) == Error(
                code="hello_required", message="say hello first", id=request_id
            )
    assert backend.requests == []


async def test_cancel_ends_the_request_and_frees_what_it_holds() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        await backend.submitted()
        backend.streams[0].feed([TokenEvent(0, 5)])
        assert isinstance(await client.receive(), Tokens)
        error = await client.ask(Cancel(id=1))
        assert error == Error(id=1, code="cancelled", message="the request was cancelled")
        await backend.streams[0].cancelled.wait()
        client.send(Cancel(id=1), Cancel(id=77))
        assert isinstance(await client.ask(Ping()), Pong)


async def test_a_request_cancelled_at_once_holds_nothing() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"), Cancel(id=1))
        error = await client.receive()
        assert isinstance(error, Error)
        assert (error.id, error.code) == (1, "cancelled")
        assert isinstance(await client.ask(Ping()), Pong)
        assert all(stream.cancelled.is_set() for stream in backend.streams)


async def test_an_id_in_flight_is_refused_without_touching_its_owner() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        error = await client.ask(Generate(id=1, text="y"))
        assert error == Error(
            code="invalid_request", message="request 1 is already in flight", field="id"
        )
        await backend.submitted()
        backend.streams[0].feed(events([5]))
        tokens, end = await client.answers()
        assert (len(tokens), type(end)) == (1, Done)
        client.send(Generate(id=1, text="z"))
        await backend.submitted(2)


async def test_a_connection_has_a_limit_of_requests_in_flight() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        for request_id in range(MAX_REQUESTS_IN_FLIGHT):
            client.send(Generate(id=request_id, token_ids=[5]))
        error = await client.ask(Generate(id=5000, token_ids=[5]))
        assert error == Error(
            id=5000,
            code="overloaded",
            message="a connection has at most 1024 requests in flight",
            retry_after_s=1.0,
        )
        await client.ask(Cancel(id=3))
        client.send(Generate(id=5000, token_ids=[5]))
        await backend.submitted(MAX_REQUESTS_IN_FLIGHT + 1)


async def test_a_second_hello_starts_afresh() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        await backend.submitted()
        await client.hello()
        await backend.streams[0].cancelled.wait()
        client.send(Generate(id=1, text="x"))
        await backend.submitted(2)


async def test_a_silent_client_is_forgotten_and_what_it_had_is_cancelled() -> None:
    backend, clock = FakeBackend(), FakeClock()
    async with (
        running_face(backend, clock=clock) as face,
        raw_client(face.endpoint) as silent,
        raw_client(face.endpoint) as alive,
    ):
        for client in (silent, alive):
            await client.hello()
            client.send(Generate(id=1, text="x"))
        await backend.submitted(2)
        clock.time = CLIENT_TIMEOUT_S - 1
        await alive.ask(Ping())
        face.forget_silent()
        assert face.num_clients == 2
        clock.time = CLIENT_TIMEOUT_S
        face.forget_silent()
        assert face.num_clients == 1
        await backend.streams[0].cancelled.wait()
        assert not backend.streams[1].cancelled.is_set()
        error = await silent.ask(Ping())
        assert isinstance(error, Error)
        assert error.code == "hello_required"
        await silent.hello()


async def test_a_client_that_is_gone_has_its_requests_cancelled_at_the_next_token() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face:
        async with raw_client(face.endpoint) as client:
            await client.hello()
            client.send(Generate(id=1, text="x"))
            await backend.submitted()
        # ZeroMQ notices the closed connection by itself, some time after.
        while not backend.streams[0].cancelled.is_set():
            backend.streams[0].feed([TokenEvent(0, 5)])
            await face_turn(face)
        assert face.num_clients == 0


async def face_turn(face: Any) -> None:
    """Return when a message has gone to the face and back."""
    async with raw_client(face.endpoint) as client:
        await client.ask(Ping())


async def test_a_face_that_drains_refuses_new_requests_and_finishes_old_ones() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        await backend.submitted()
        face.drain()
        error = await client.ask(Generate(id=2, text="x"))
        assert isinstance(error, Error)
        assert (error.id, error.code) == (2, "unavailable")
        backend.streams[0].feed(events([5]))
        assert isinstance((await client.answers())[1], Done)


async def test_a_face_that_closes_says_so_to_every_request() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        for request_id in (1, 2):
            client.send(Generate(id=request_id, text="x"))
        await backend.submitted(2)
        face.close()
        for request_id in (1, 2):
            assert await client.receive() == Error(
                id=request_id,
                code="unavailable",
                message="the gateway is shutting down",
                retry_after_s=1.0,
            )
        for stream in backend.streams:
            await stream.cancelled.wait()


async def test_a_bound_port_is_refused_by_name() -> None:
    async with running_face(FakeBackend()) as face:
        with pytest.raises(Exception, match=f"cannot bind {face.endpoint}: Address already in use"):
            async with running_face(FakeBackend(), endpoint=face.endpoint):
                pass
