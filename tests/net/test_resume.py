"""Streams go on at another gateway, or at the same when it is back: as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvbaton import AsyncClient, AsyncGeneration, Client
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from kvbaton.protocol import Accepted, Cancel, Error, Generate, Resume, Token, Tokens
from kvbaton.request import RequestOptions
from services.gateway.backend import GenerationRequest, TokenEvent
from services.gateway.clients.face import ClientFace
from tests.net.gateways import PATIENCE_S, running_face, scripted_gateway
from tests.unit.gateway_fakes import FakeBackend, RefusedError, says

# Characters of several tokens, and a stop string of several.
TEXT = "one 🦊 two 🎉 three four"
NUM_TOKENS = len(says(TEXT))
STOP = "🎉 three"
SHORT_S = 0.1


def answers(*num_tokens: int) -> FakeBackend:
    """TEXT, from where a request goes on. The first ones stall after so many tokens in all."""
    stalls = iter(num_tokens)

    def script(request: GenerationRequest) -> list[TokenEvent]:
        return says(TEXT)[len(request.resumed) : next(stalls, NUM_TOKENS)]

    return FakeBackend(script)


async def undisturbed(stop: str | None = None) -> tuple[list[Token], AsyncGeneration]:
    async with running_face(answers()) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x", logprobs=1, stop=stop)
        return [token async for token in stream], stream


@asynccontextmanager
async def two_faces(backend: FakeBackend) -> AsyncIterator[tuple[AsyncClient, list[ClientFace]]]:
    """Two gateways in front of the same workers, and a client of both."""
    async with (
        running_face(backend) as first,
        running_face(backend) as second,
        AsyncClient([first.endpoint, second.endpoint]) as client,
    ):
        yield client, [first, second]


def take_busy(faces: list[ClientFace]) -> ClientFace:
    """Take out the one gateway that serves a request."""
    (busy,) = [face for face in faces if any(face._clients.values())]
    faces.remove(busy)
    return busy


def crash(faces: list[ClientFace]) -> None:
    """The gateway that serves a request ends without a word."""
    take_busy(faces)._socket.close()


async def read(stream: AsyncGeneration, num_tokens: int) -> list[Token]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(stream) for _ in range(num_tokens)]


async def rest(stream: AsyncGeneration) -> list[Token]:
    async with asyncio.timeout(PATIENCE_S):
        return [token async for token in stream]


@pytest.mark.parametrize("stop", [None, STOP])
@pytest.mark.parametrize("num_before", [0, 1, 3, 5, 8, 9])
async def test_nothing_is_missing_twice_or_different_after_a_crash(
    num_before: int, stop: str | None
) -> None:
    expected, expected_end = await undisturbed(stop)
    backend = answers(num_before)
    async with two_faces(backend) as (client, faces):
        stream = client.generate("x", logprobs=1, stop=stop)
        await backend.submitted()
        tokens = await read(stream, num_before)
        crash(faces)
        tokens += await rest(stream)
    assert tokens == expected
    assert (stream.text, stream.finish_reason, stream.usage) == (
        expected_end.text,
        expected_end.finish_reason,
        expected_end.usage,
    )
    first, second = backend.requests
    assert second.resumed == tuple(token.token_id for token in tokens[:num_before])
    assert (second.request_id, second.sampling) == (first.request_id, first.sampling)
    assert first.sampling.seed is not None


async def test_a_stream_survives_one_gateway_after_the_other() -> None:
    expected, _ = await undisturbed()
    backend = answers(2, 5, 7)
    async with AsyncExitStack() as stack:
        faces = [await stack.enter_async_context(running_face(backend)) for _ in range(4)]
        client = await stack.enter_async_context(AsyncClient([face.endpoint for face in faces]))
        stream = client.generate("x", logprobs=1)
        tokens: list[Token] = []
        for num_tokens in (2, 3, 2):
            tokens += await read(stream, num_tokens)
            crash(faces)
        tokens += await rest(stream)
    assert tokens == expected


async def test_a_stream_waits_for_its_only_gateway_to_come_back() -> None:
    expected, _ = await undisturbed()
    backend = answers(4)
    async with running_face(backend, instance_id="instance-1") as face:
        endpoint = face.endpoint
        client = AsyncClient(endpoint)
        stream = client.generate("x", logprobs=1)
        tokens = await read(stream, 4)
        crash([face])
    other = client.generate("y", logprobs=1)  # made while there is no gateway
    async with running_face(backend, endpoint=endpoint, instance_id="instance-2"):
        assert tokens + await rest(stream) == expected
        assert await rest(other) == expected
        await client.close()


async def test_what_a_gateway_that_ends_in_order_cannot_finish_goes_on_elsewhere() -> None:
    expected, _ = await undisturbed()
    backend = answers(4)
    async with two_faces(backend) as (client, faces):
        stream = client.generate("x", logprobs=1)
        tokens = await read(stream, 4)
        take_busy(faces).close()
        assert tokens + await rest(stream) == expected
        assert len(await rest(client.generate("x"))) == NUM_TOKENS


async def test_a_rolling_restart_disturbs_no_stream() -> None:
    expected, _ = await undisturbed()
    # Each gateway gives two tokens more and waits to be fed.
    backend = FakeBackend(lambda request: says(TEXT)[len(request.resumed) :][:2])
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        faces = [
            await stack.enter_async_context(running_face(backend)) for stack in (first, second)
        ]
        client = AsyncClient([face.endpoint for face in faces])
        await client.connect()
        readers = [asyncio.ensure_future(rest(client.generate("x", logprobs=1))) for _ in range(6)]
        await backend.submitted(6)
        num_submitted = 6
        for stack, face in zip((first, second), faces, strict=True):
            num_submitted += sum(len(requests) for requests in face._clients.values())
            await stack.aclose()
            await backend.submitted(num_submitted)
            await stack.enter_async_context(running_face(backend, endpoint=face.endpoint))
        for request, stream in zip(backend.requests, backend.streams, strict=True):
            if not stream.cancelled.is_set():
                stream.feed(says(TEXT)[len(request.resumed) + 2 :])
        assert await asyncio.gather(*readers) == [expected] * 6
        await client.close()


async def test_new_requests_avoid_a_gateway_that_drains() -> None:
    backend = answers(1)
    async with two_faces(backend) as (client, faces):
        stream = client.generate("x")
        await read(stream, 1)
        take_busy(faces)
        faces[0].drain()  # the one that a new request would go to
        for _ in range(3):
            assert len(await rest(client.generate("y"))) == NUM_TOKENS
        stream.cancel()


async def test_the_end_alone_is_repeated_without_a_worker() -> None:
    expected, _ = await undisturbed()
    backend = answers()
    async with scripted_gateway() as gateway:
        endpoint = gateway.endpoint
        client = AsyncClient(endpoint)
        stream = client.generate("x", logprobs=1)
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Accepted(id=1, request_id="a" * 32, seed=7))
        gateway.send(Tokens(id=1, tokens=expected, finish_reason="length"))
        assert await read(stream, NUM_TOKENS) == expected
    async with running_face(backend, endpoint=endpoint):
        assert await rest(stream) == []
        await client.close()
    assert backend.requests == []
    assert (stream.finish_reason, stream.request_id) == ("length", "a" * 32)
    assert stream.usage is not None
    assert stream.usage.num_output_tokens == NUM_TOKENS


async def test_the_next_gateway_is_told_what_is_left_of_the_deadline() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x", deadline_s=1000)
        await gateway.welcome()
        first = await gateway.receive()
        gateway.send(Accepted(id=1, request_id="a" * 32, seed=7))
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        await read(stream, 1)
        gateway.send(Error(id=1, code="unavailable", message="shutting down"))
        second = await gateway.receive()
        assert isinstance(first, Generate)
        assert isinstance(second, Generate)
        assert first.deadline_ms == 1_000_000
        assert second.deadline_ms is not None
        assert 0 < second.deadline_ms <= 1_000_000
        assert second.resume == Resume(request_id="a" * 32, seed=7, tokens=[5])
        assert second.sampling.seed == 7
        await client.close()


@pytest.mark.parametrize(
    ("options", "resume_s", "error"),
    [({}, SHORT_S, ConnectionLostError), ({"deadline_s": SHORT_S}, 60, DeadlineError)],
)
async def test_a_stream_whose_gateway_stays_away_ends_in_time(
    options: RequestOptions, resume_s: float, error: type[KvbatonError]
) -> None:
    backend = answers(1)
    async with running_face(backend) as face:
        client = AsyncClient(face.endpoint, resume_s=resume_s)
        stream = client.generate("x", **options)
        await read(stream, 1)
        crash([face])
        with pytest.raises(error):
            await rest(stream)
        await client.close()


async def test_a_stream_without_a_gateway_can_be_cancelled() -> None:
    backend = answers(1)
    async with running_face(backend) as face:
        client = AsyncClient(face.endpoint)
        stream = client.generate("x")
        await read(stream, 1)
        crash([face])
    stream.cancel()
    with pytest.raises(CancelledRequestError):
        await rest(stream)
    await client.close()


async def test_a_client_closes_while_a_stream_has_no_gateway() -> None:
    async with running_face(answers(1)) as face:
        client = AsyncClient(face.endpoint)
        stream = client.generate("x")
        await read(stream, 1)
        crash([face])
    await client.close()
    with pytest.raises(ConnectionLostError, match="the client was closed"):
        await rest(stream)


async def test_a_request_that_was_refused_for_now_is_made_again() -> None:
    refusals = iter([RefusedError(UnavailableError("no decode worker is alive"))] * 3)
    backend = FakeBackend(
        lambda _: [next(refusals, None) or TokenEvent(0, 5, finish_reason="stop")]
    )
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        assert len(await rest(client.generate("x"))) == 1


async def test_a_request_that_is_always_refused_ends_with_the_reason() -> None:
    backend = FakeBackend(lambda _: [RefusedError(UnavailableError("no decode worker is alive"))])
    async with (
        running_face(backend) as face,
        AsyncClient(face.endpoint, resume_s=SHORT_S) as client,
    ):
        with pytest.raises(UnavailableError, match="no decode worker is alive"):
            await rest(client.generate("x"))


async def test_load_refuses_new_requests_but_not_those_that_were_accepted() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        streams = [client.generate("x"), client.generate("y")]
        await gateway.welcome()
        for _ in streams:
            await gateway.receive()
        gateway.send(Accepted(id=2, request_id="a" * 32, seed=7))
        for request_id in (1, 2):
            gateway.send(Error(id=request_id, code="overloaded", message="full"))
        again = await gateway.receive()
        assert isinstance(again, Generate)
        assert again.resume == Resume(request_id="a" * 32, seed=7)
        with pytest.raises(OverloadedError):
            await rest(streams[0])
        await client.close()


async def test_a_gateway_that_does_not_know_how_to_resume_begins_again() -> None:
    """It is of a former version, as in a rolling upgrade."""
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Accepted(id=1, request_id="a" * 32, seed=7))
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        gateway.send(Error(id=1, code="unavailable", message="shutting down"))
        await gateway.receive()
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        gateway.send(Tokens(id=1, tokens=[Token(index=1, token_id=6)]))
        assert [token.token_id for token in await read(stream, 2)] == [5, 6]
        await client.close()


async def test_a_stream_of_a_gateway_that_does_not_know_how_to_resume_is_lost_with_it() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Tokens(id=1, tokens=[Token(index=0, token_id=5)]))
        await read(stream, 1)
    with pytest.raises(ConnectionLostError):
        await rest(stream)
    await client.close()


async def test_a_gateway_that_leaves_a_token_out_is_not_believed() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x")
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Tokens(id=1, tokens=[Token(index=1, token_id=5)]))
        with pytest.raises(ProtocolError, match="token 0 was due"):
            await rest(stream)
        assert await gateway.receive() == Cancel(id=1)
        await client.close()


async def test_the_client_for_threads_resumes_too() -> None:
    expected, _ = await undisturbed()
    backend = answers(4)
    async with running_face(backend) as first, running_face(backend) as second:
        loop, faces = asyncio.get_running_loop(), [first, second]

        def read_all() -> list[Token]:
            with Client([face.endpoint for face in faces]) as client:
                stream = client.generate("x", logprobs=1)
                tokens = [next(stream) for _ in range(4)]
                loop.call_soon_threadsafe(crash, faces)
                return tokens + list(stream)

        assert await asyncio.to_thread(read_all) == expected
