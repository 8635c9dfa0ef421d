"""The tokens of one request by value: in order, once, and never after the end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import OutputToken
from kvbaton.errors import KvbatonError, UnavailableError
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, TokenEvent
from services.gateway.routing.stream import RequestStream


def stream_of() -> RequestStream:
    return RequestStream(GenerationRequest("request", [5, 6], SamplingParams()), received_at=3.0)


def token(index: int, finish_reason: str | None = None) -> OutputToken:
    """The token at an index is always the same one."""
    return OutputToken(
        handoff_id="h", index=index, token_id=100 + index, finish_reason=finish_reason
    )


async def read(stream: RequestStream, num_events: int) -> list[TokenEvent]:
    """What has come already; waiting for more would hang, and is an error here."""
    return [await asyncio.wait_for(anext(stream), 1.0) for _ in range(num_events)]


async def test_tokens_are_read_as_they_came() -> None:
    stream = stream_of()
    first = OutputToken(
        handoff_id="h", index=0, token_id=9, logprob=-0.5, top_logprobs=[(9, -0.5), (8, -1.5)]
    )
    assert not stream.deliver(first)
    assert await read(stream, 1) == [TokenEvent(0, 9, -0.5, ((9, -0.5), (8, -1.5)))]
    assert stream.tokens == [9]
    assert (stream.request_id, stream.timeline.received_at) == ("request", 3.0)


async def test_the_last_token_ends_the_stream() -> None:
    stream = stream_of()
    assert not stream.deliver(token(0))
    assert stream.deliver(token(1, "length"))
    assert stream.is_over
    events = await read(stream, 2)
    assert [event.finish_reason for event in events] == [None, "length"]


async def test_a_token_that_comes_early_waits_for_those_before_it() -> None:
    stream = stream_of()
    stream.deliver(token(2, "stop"))
    stream.deliver(token(1))
    assert stream.tokens == []
    assert stream.deliver(token(0))
    assert [event.index for event in await read(stream, 3)] == [0, 1, 2]


async def test_a_token_that_comes_twice_is_read_once() -> None:
    stream = stream_of()
    for index in (0, 0, 1, 0, 1):
        stream.deliver(token(index))
    assert stream.tokens == [100, 101]


async def test_nothing_is_read_after_the_last_token() -> None:
    stream = stream_of()
    stream.deliver(token(1))
    stream.deliver(token(0, "stop"))
    assert stream.tokens == [100]


async def test_a_request_placed_again_forgets_what_came_early() -> None:
    stream = stream_of()
    stream.deliver(token(0))
    stream.deliver(token(2))
    stream.restart()
    stream.deliver(token(1))
    assert stream.tokens == [100, 101]


@given(
    st.integers(1, 8).flatmap(
        lambda count: st.lists(st.integers(0, count - 1), max_size=30).map(
            lambda order: (count, [*order, *range(count)])
        )
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_in_any_order_every_token_comes_out_in_its_place(case: tuple[int, list[int]]) -> None:
    count, order = case

    async def main() -> list[int]:
        stream = stream_of()
        ends = [
            stream.deliver(token(index, "stop" if index == count - 1 else None)) for index in order
        ]
        assert ends == sorted(ends)
        assert ends[-1]
        return [event.token_id for event in await read(stream, count)]

    assert asyncio.run(main()) == [100 + index for index in range(count)]


async def test_a_cancelled_stream_takes_no_more_and_ends_its_task() -> None:
    stream = stream_of()
    stream.task = asyncio.create_task(asyncio.sleep(60))
    stream.deliver(token(0))
    stream.cancel()
    stream.cancel()
    assert stream.deliver(token(1))
    assert stream.tokens == [100]
    with pytest.raises(asyncio.CancelledError):
        await stream.task


async def test_a_cancel_after_the_end_leaves_the_task_alone() -> None:
    stream = stream_of()
    stream.task = asyncio.create_task(asyncio.sleep(0))
    stream.deliver(token(0, "stop"))
    stream.cancel()
    await stream.task


async def test_a_failure_is_raised_after_the_tokens_before_it() -> None:
    stream = stream_of()
    stream.deliver(token(0))
    stream.fail(UnavailableError("no worker"))
    stream.fail(KvbatonError("too late"))
    assert len(await read(stream, 1)) == 1
    with pytest.raises(UnavailableError, match="no worker"):
        await read(stream, 1)
    assert stream.is_over


async def test_giving_up_tells_the_reader_and_ends_the_task() -> None:
    stream = stream_of()
    stream.task = asyncio.create_task(asyncio.sleep(60))
    stream.give_up(UnavailableError("shutting down"))
    with pytest.raises(UnavailableError, match="shutting down"):
        await read(stream, 1)
    with pytest.raises(asyncio.CancelledError):
        await stream.task


async def test_a_stream_that_is_over_neither_fails_nor_gives_up() -> None:
    stream = stream_of()
    stream.deliver(token(0, "stop"))
    stream.fail(KvbatonError("late"))
    stream.give_up(KvbatonError("late"))
    assert [event.finish_reason for event in await read(stream, 1)] == ["stop"]
    more = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not more.done()
    more.cancel()
