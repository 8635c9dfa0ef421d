"""Numbers of messages: whatever a network does, what is handled is what was said, in order."""

from __future__ import annotations

from collections import deque

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Heartbeat, ToStore, decoder
from common.net.order import Incoming, Verdict, first_number, is_first, is_of_connection, read
from kvbaton.errors import ProtocolError

_DECODER = decoder(ToStore)


@st.composite
def disturbed(draw: st.DrawFn) -> tuple[int, list[int]]:
    """How many messages were sent, and what came: some lost, some twice, in any order."""
    num_sent = draw(st.integers(1, 12))
    copies = draw(st.lists(st.integers(0, 2), min_size=num_sent, max_size=num_sent))
    came = [index for index, times in enumerate(copies) for _ in range(times)]
    return num_sent, draw(st.permutations(came))


@given(disturbed(), st.integers(0, 2**20))
def test_what_is_handled_is_a_prefix_of_what_was_sent_and_a_gap_is_always_told(
    messages: tuple[int, list[int]], connection: int
) -> None:
    num_sent, came = messages
    first = first_number(connection)
    incoming = Incoming(first)
    handled: list[int] = []
    seen: set[int] = set()
    for index in came:
        missing = set(range(index)) - seen
        verdict = incoming.take(first + index)
        if index in handled:
            assert verdict is Verdict.SEEN
        elif missing or verdict is Verdict.GAP:
            # A receiver listens no more from here on.
            assert missing
            assert verdict is Verdict.GAP
            break
        else:
            assert verdict is Verdict.NEXT
            handled.append(index)
        seen.add(index)
    assert handled == list(range(len(handled)))
    if set(came) == set(range(num_sent)) and list(dict.fromkeys(came)) == sorted(set(came)):
        assert len(handled) == num_sent  # duplicates alone lose nothing


@given(st.data())
def test_messages_of_former_connections_are_never_the_next(data: st.DataObject) -> None:
    connections = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=30))
    waiting = {each: deque(first_number(each) + index for index in range(30)) for each in (1, 2, 3)}
    now = Incoming(first_number(2))
    for connection in connections:
        expected = {1: Verdict.SEEN, 2: Verdict.NEXT, 3: Verdict.GAP}[connection]
        assert now.take(waiting[connection].popleft()) is expected


@given(st.integers(0, 2**23 - 1), st.integers(0, 2**40 - 3))
def test_a_number_belongs_to_one_connection(connection: int, index: int) -> None:
    first = first_number(connection)
    assert is_first(first)
    assert is_first(first + index) == (index == 0)
    assert is_of_connection(first + index, first)
    assert first + index < first_number(connection + 1)


@pytest.mark.parametrize("number", [-(2**62), -(2**40) + 1, -1, 0, 2, 2**40, 2**40 + 2])
def test_what_no_connection_may_begin_with(number: int) -> None:
    assert not is_first(number)


def envelope(**fields: object) -> list[memoryview]:
    return [memoryview(msgpack.packb(fields))]


def test_a_message_is_read_with_its_numbers() -> None:
    message, refusal = read(_DECODER, envelope(type="heartbeat", call_id=3, number=7))
    assert message == Heartbeat(call_id=3, number=7)
    assert refusal is None


@pytest.mark.parametrize(
    ("frames", "numbers"),
    [
        ([], (0, 0)),
        ([memoryview(b"")], (0, 0)),
        ([memoryview(b"\xc1")], (0, 0)),
        (envelope(type="nope", call_id=3, number=7), (3, 7)),
        (envelope(type="lease", call_id=3, number=7, num_blocks=-1), (3, 7)),
        (envelope(call_id=3, number=7), (3, 7)),
        (envelope(type="heartbeat", call_id=3, number="7"), (0, 0)),
        (envelope(type="heartbeat", call_id=3, number=None), (0, 0)),
    ],
)
def test_what_is_refused_keeps_its_place_where_it_can_be_read(
    frames: list[memoryview], numbers: tuple[int, int]
) -> None:
    message, refusal = read(_DECODER, frames)
    assert (message.call_id, message.number) == numbers
    assert isinstance(refusal, ProtocolError)
