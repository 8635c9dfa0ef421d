"""The index of the disk tier: places, the budget, and what goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import StartError
from services.kvstore.disk.format import record_offset
from services.kvstore.disk.index import DiskIndex, Segment
from tests.unit.disk_world import BLOCK_BYTES, OTHER_BYTES, RECORDS, SEGMENT_BYTES, key_of


def index_of(num_segments: int) -> DiskIndex:
    return DiskIndex(num_segments * SEGMENT_BYTES + OTHER_BYTES, BLOCK_BYTES)


def add(index: DiskIndex, numbers: list[int]) -> list[int]:
    """Write blocks; returns the numbers of the segments that go."""
    gone = []
    while numbers:
        write = index.plan(len(numbers), 1)
        batch, numbers = numbers[: write.num_records], numbers[write.num_records :]
        gone += [segment.number for segment in write.doomed]
        index.written(write, [key_of(n) for n in batch])
    return gone


def present(index: DiskIndex, numbers: range) -> list[int]:
    return [n for n in numbers if index.get(key_of(n)) is not None]


def test_what_was_added_is_here_and_nothing_else() -> None:
    index = index_of(4)
    assert present(index, range(5)) == []
    add(index, [0, 1, 3])
    assert present(index, range(5)) == [0, 1, 3]


def test_the_oldest_segment_goes_whole_when_the_budget_is_used_up() -> None:
    index = index_of(2)
    assert add(index, list(range(2 * RECORDS))) == []
    assert add(index, [100]) == [1]
    assert present(index, range(2 * RECORDS)) == list(range(RECORDS, 2 * RECORDS))
    assert index.num_segments == 2


def test_what_must_go_counts_until_it_is_removed() -> None:
    index = index_of(2)
    add(index, list(range(2 * RECORDS)))
    write = index.plan(1, 1)
    assert present(index, range(RECORDS)) == []
    assert index.num_bytes == 2 * SEGMENT_BYTES + record_offset(1, BLOCK_BYTES)
    assert index.plan(1, 1).doomed == write.doomed  # the first write has failed
    index.written(write, [key_of(50)])
    assert index.num_bytes == SEGMENT_BYTES + record_offset(1, BLOCK_BYTES)


def test_a_write_that_failed_is_made_in_the_same_place() -> None:
    index = index_of(4)
    add(index, [0])
    failed = index.plan(3, 1)
    write = index.plan(1, 1)
    assert (write.segment, write.first_slot) == (failed.segment, failed.first_slot)
    assert index.num_bytes == SEGMENT_BYTES  # what the failed one may have left is counted


def test_unusable_segments_go_first() -> None:
    index = index_of(3)
    used = Segment(1, 7, SEGMENT_BYTES, keys={0: key_of(0)})
    index.restore([used, Segment(2, None, SEGMENT_BYTES)])
    assert add(index, list(range(10, 10 + RECORDS))) == []
    assert add(index, [20]) == [2]
    assert present(index, range(1)) == [0]


def test_of_two_blocks_with_one_key_the_later_counts() -> None:
    index = index_of(4)
    old = Segment(1, 7, SEGMENT_BYTES, keys={0: key_of(0)})
    new = Segment(2, 8, SEGMENT_BYTES, keys={3: key_of(0)})
    index.restore([new, old])
    place = index.get(key_of(0))
    assert place is not None
    assert (place.segment, place.slot) == (new, 3)
    assert old.keys == {}


def test_a_block_rewritten_meanwhile_is_not_forgotten() -> None:
    index = index_of(4)
    add(index, [0])
    place = index.get(key_of(0))
    assert place is not None
    add(index, [0])
    index.forget(key_of(0), place)
    assert present(index, range(1)) == [0]


def test_blocks_that_go_next_are_not_safe() -> None:
    index = index_of(4)
    add(index, list(range(4 * RECORDS)))
    assert not index.is_safe(key_of(0))
    assert index.is_safe(key_of(RECORDS))
    assert not index.is_safe(key_of(1000))


def test_a_budget_for_too_few_blocks_is_refused() -> None:
    index_of(2)
    with pytest.raises(StartError, match=f"needs at least {2 * SEGMENT_BYTES + OTHER_BYTES}"):
        DiskIndex(2 * SEGMENT_BYTES + OTHER_BYTES - 1, BLOCK_BYTES)


@given(
    st.integers(2, 6),
    st.lists(
        st.tuples(
            st.sampled_from(["write", "fail", "forget"]), st.lists(st.integers(0, 40), max_size=9)
        )
    ),
)
def test_places_and_budget_hold(num_segments: int, steps: list[tuple[str, list[int]]]) -> None:
    index = index_of(num_segments)
    for step, numbers in steps:
        if step == "write":
            add(index, numbers)
            assert not numbers or index.num_bytes <= num_segments * SEGMENT_BYTES
        elif step == "fail" and numbers:
            index.plan(len(numbers), 1)
        elif step == "forget":
            for number in numbers:
                place = index.get(key_of(number))
                if place is not None:
                    index.forget(key_of(number), place)
        found = present(index, range(41))
        assert index.num_blocks == len(found)
        for number in found:
            place = index.get(key_of(number))
            assert place is not None
            assert place.segment.keys[place.slot] == key_of(number)
            assert place.slot < place.segment.num_records
