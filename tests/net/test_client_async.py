"""AsyncClient against a running face, on asyncio's own loop."""

from __future__ import annotations

import asyncio
import gc

import pytest

from kvbaton import AsyncClient
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    UnprocessableError,
)
from services.gateway.backend import GenerationRequest, TokenEvent
from tests.net.gateways import running_face
from tests.unit.gateway_fakes import FakeBackend, RefusedError, events, says


async def test_a_generation_gives_tokens_and_then_how_it_ended() -> None:
    backend = FakeBackend(lambda _: says("hello, wörld", stops=True))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("def f(", max_tokens=32, logprobs=1)
        assert (stream.finish_reason, stream.usage, stream.timings) == (None, None, None)
        tokens = [token async for token in stream]
        assert [token async for token in stream] == []
    assert "".join(token.text for token in tokens) == stream.text == "hello, wörld"
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert tokens[0].logprob == -1.0
    assert tokens[0].top_logprobs[1] == (tokens[0].token_id + 1, -9.0)
    assert stream.finish_reason == "stop"
    assert stream.usage is not None
    assert stream.usage.num_output_tokens == len(tokens)
    assert stream.timings is not None


async def test_connect_says_what_is_served() -> None:
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        welcome = await client.connect()
        assert (welcome.model, welcome.max_model_len) == ("demo", 2048)
        assert face.num_clients == 1


async def test_all_options_arrive() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        for stream in (
            client.generate(token_ids=[4, 5], seed=3, deadline_s=2.5, model="demo", stop="x"),
            client.generate(messages=[{"role": "user", "content": "hello"}]),
        ):
            async for _ in stream:
                pass
    assert backend.requests[0].prompt == [4, 5]
    assert backend.requests[0].sampling.seed == 3
    assert backend.requests[0].deadline_s == 2.5
    assert len(backend.requests[1].prompt) > 2


async def test_many_requests_share_one_connection() -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        return events([request.prompt[0] + index for index in range(10)])

    async def read(client: AsyncClient, number: int) -> list[int]:
        return [token.token_id async for token in client.generate(token_ids=[number])]

    async with running_face(FakeBackend(script)) as face, AsyncClient(face.endpoint) as client:
        answers = await asyncio.gather(*(read(client, number) for number in range(3, 103)))
        assert face.num_clients == 1
    assert answers == [list(range(number, number + 10)) for number in range(3, 103)]


async def test_requests_made_before_the_connection_wait_for_it() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face:
        client = AsyncClient(face.endpoint)
        streams = [client.generate("x") for _ in range(3)]
        assert [len([token async for token in stream]) for stream in streams] == [1, 1, 1]
        await client.close()


async def test_a_refused_request_raises_its_own_error() -> None:
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(InvalidRequestError, match="at most 100, got 1000") as caught:
            await anext(client.generate("x", temperature=1000))
        assert caught.value.field == "temperature"
        with pytest.raises(UnprocessableError, match="Expected `int"):
            client.generate("x", max_tokens="many")  # type: ignore[arg-type]


async def test_errors_amid_the_tokens_come_after_them() -> None:
    script: list[TokenEvent | Exception] = [TokenEvent(0, 5), DeadlineError("too late")]
    backend = FakeBackend(lambda _: script)
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x")
        assert (await anext(stream)).token_id == 5
        with pytest.raises(DeadlineError, match="too late"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_hint_when_to_retry_arrives() -> None:
    refusal = RefusedError(OverloadedError("full", retry_after_s=2.5))
    backend = FakeBackend(lambda _: [refusal])
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(OverloadedError) as caught:
            await anext(client.generate("x"))
    assert caught.value.retry_after_s == 2.5


async def test_cancel_ends_the_iteration_with_an_error() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x")
        await backend.submitted()
        stream.cancel()
        with pytest.raises(CancelledRequestError):
            await anext(stream)
        await backend.streams[0].cancelled.wait()


async def test_leaving_the_loop_early_cancels_the_request() -> None:
    backend = FakeBackend(lambda _: [TokenEvent(0, 5)])
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        async for _ in client.generate("x"):
            break
        gc.collect()
        await backend.streams[0].cancelled.wait()


async def test_leaving_a_with_block_cancels_the_request() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        with client.generate("x") as stream:
            await backend.submitted()
        await backend.streams[0].cancelled.wait()
        with pytest.raises(CancelledRequestError):
            await anext(stream)


async def test_cancelling_the_reading_task_cancels_the_request() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x")
        reader = asyncio.ensure_future(anext(stream))
        await backend.submitted()
        reader.cancel()
        await backend.streams[0].cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await reader


async def test_closing_ends_what_is_in_flight_on_both_sides() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face:
        async with AsyncClient(face.endpoint) as client:
            stream = client.generate("x")
            await backend.submitted()
        await backend.streams[0].cancelled.wait()
        with pytest.raises(ConnectionLostError, match="the client was closed"):
            await anext(stream)
        with pytest.raises(ConnectionLostError, match="the client was closed"):
            await anext(client.generate("x"))
        await client.close()


async def test_a_client_waits_for_a_gateway_only_so_long() -> None:
    async with running_face(FakeBackend()) as face:
        endpoint = face.endpoint
    client = AsyncClient(endpoint, connect_timeout_s=0.05)
    with pytest.raises(ConnectionLostError, match=r"no welcome from tcp://.* within 0.05 s"):
        async with client:
            pass


async def test_an_endpoint_that_is_none_is_refused() -> None:
    client = AsyncClient("nonsense")
    with pytest.raises(ConnectionLostError, match="cannot connect to nonsense: Invalid argument"):
        await client.connect()
    await client.close()
