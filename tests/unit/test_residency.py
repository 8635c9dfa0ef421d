"""Which blocks of an arena a pool of device memory holds, and when they come and go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.cuda.residency import SPARE_BLOCK, PoolFullError, Residency, Step

SIZE = 4  # positions in a block


def begin(residency: Residency, *works: tuple[list[int], int, int]) -> Step:
    """A step over works of (slots, start, end)."""
    width = max(len(slots) for slots, _, _ in works)
    tables = np.array([slots + [0] * (width - len(slots)) for slots, _, _ in works], np.int32)
    starts, ends = (np.array([work[place] for work in works]) for place in (1, 2))
    return residency.begin_step(tables, starts, ends, SIZE)


def fetch(residency: Residency, *slots: int) -> None:
    residency.end_fetch(residency.begin_fetch(slots))


def save(residency: Residency, *slots: int) -> None:
    residency.end_save(residency.begin_save(slots))


def run(residency: Residency, *works: tuple[list[int], int, int]) -> list[int]:
    """A whole step; the slots that it had to load."""
    step = begin(residency, *works)
    residency.end_step(step)
    return sorted(step.loads.slots.tolist())


def test_tables_name_distinct_blocks_and_pad_with_the_spare_one() -> None:
    residency = Residency(16, 8)
    step = begin(residency, ([9, 3], 0, 7), ([5], 0, 2))
    assert step.tables[1, 1] == SPARE_BLOCK
    used = {int(step.tables[0, 0]), int(step.tables[0, 1]), int(step.tables[1, 0])}
    assert len(used) == 3
    assert SPARE_BLOCK not in used
    assert not len(step.loads.slots)  # nothing that was written before is read


def test_what_is_read_is_loaded_once_and_what_is_written_whole_never() -> None:
    residency = Residency(16, 8)
    assert run(residency, ([2, 7, 4], 6, 10)) == [2, 7]
    assert run(residency, ([2, 7, 4], 10, 11)) == []


def test_sequences_with_a_common_prefix_share_its_blocks() -> None:
    residency = Residency(16, 8)
    step = begin(residency, ([1, 2], 4, 5), ([1, 3], 4, 5))
    assert step.tables[0, 0] == step.tables[1, 0]
    assert step.loads.slots.tolist() == [1]


def test_the_longest_unused_block_makes_room_and_never_an_unsaved_one() -> None:
    residency = Residency(16, 1 + 4)
    fetch(residency, 1)
    fetch(residency, 2)
    run(residency, ([3], 0, 2))  # unsaved
    run(residency, ([1], 4, 4))  # read alone
    run(residency, ([4], 0, 1))
    run(residency, ([5], 0, 1))  # one too many: 2 leaves
    assert run(residency, ([1], 4, 4)) == []
    assert run(residency, ([3], 2, 3)) == []
    save(residency, 3, 4, 5)
    assert residency.unsaved() == []
    assert run(residency, ([2], 4, 4)) == [2]


def test_a_step_too_large_for_the_pool_changes_nothing() -> None:
    residency = Residency(16, 1 + 3)
    run(residency, ([1], 0, 4))
    fetch(residency, 2)
    with pytest.raises(PoolFullError, match="1 more KV blocks"):
        begin(residency, ([2, 3, 4], 4, 12))
    assert run(residency, ([1], 3, 4), ([2], 4, 4)) == []
    residency.forget([1])
    assert run(residency, ([2, 3, 4], 4, 12)) == []


def test_blocks_that_a_step_uses_stay_until_it_ends() -> None:
    residency = Residency(16, 1 + 2)
    fetch(residency, 1, 2)
    step = begin(residency, ([1, 2], 8, 8))
    with pytest.raises(PoolFullError):
        begin(residency, ([3], 0, 1))
    copies = residency.begin_fetch([4])
    assert not len(copies.slots)  # no room: the step that reads it loads it
    residency.end_step(step)
    assert run(residency, ([4], 4, 4)) == [4]


def test_a_fetch_replaces_an_old_copy_while_a_step_reads_that() -> None:
    residency = Residency(16, 8)
    fetch(residency, 1)
    step = begin(residency, ([1], 4, 4))
    fetch(residency, 1)
    later = begin(residency, ([1], 4, 4))
    assert later.tables[0, 0] != step.tables[0, 0]
    assert not len(later.loads.slots)
    num_free = residency.num_free
    residency.end_step(step)
    assert residency.num_free == num_free + 1


def test_a_fetch_that_was_overtaken_leaves_no_trace() -> None:
    residency = Residency(16, 8)
    early = residency.begin_fetch([1, 2])
    late = residency.begin_fetch([2])
    step = begin(residency, ([1], 0, 3))
    residency.end_step(step)
    residency.end_fetch(late)
    residency.end_fetch(early)
    again = begin(residency, ([1], 3, 4), ([2], 4, 4))
    assert again.tables[0, 0] == step.tables[0, 0]
    assert again.tables[1, 0] == late.blocks[0]
    assert residency.num_free == 7 - 2


def test_what_is_unsaved_is_not_fetched_over() -> None:
    residency = Residency(16, 8)
    run(residency, ([1], 0, 3))
    assert not len(residency.begin_fetch([1]).slots)
    assert len(residency.unsaved()) == 1


def test_a_write_during_a_save_is_still_to_be_saved() -> None:
    residency = Residency(16, 8)
    run(residency, ([1], 0, 2))
    copies = residency.begin_save([1])
    run(residency, ([1], 2, 3))
    residency.end_save(copies)
    assert len(residency.unsaved()) == 1
    save(residency, 1)
    assert residency.unsaved() == []
    assert not len(residency.begin_save([1]).slots)


def test_a_block_that_is_saved_stays_until_that_is_done() -> None:
    residency = Residency(16, 1 + 1)
    run(residency, ([1], 0, 2))
    copies = residency.begin_save([1])
    residency.forget([1])
    with pytest.raises(PoolFullError):
        begin(residency, ([2], 0, 1))
    residency.end_save(copies)
    assert run(residency, ([2], 0, 1)) == []


def test_loads_that_failed_are_loaded_again() -> None:
    residency = Residency(16, 8)
    step = begin(residency, ([1, 2], 5, 6))
    residency.drop(step.loads)
    residency.end_step(step)
    assert residency.num_free == 7
    assert run(residency, ([1, 2], 5, 6)) == [1, 2]


def test_slots_over_which_other_memory_was_mapped_hold_nothing() -> None:
    residency = Residency(16, 8)
    run(residency, ([1, 2, 3], 0, 12))
    residency.clear(2, 99)
    assert len(residency.unsaved()) == 1
    assert not len(residency.begin_save([2, 3]).slots)
    assert run(residency, ([1, 2], 8, 8)) == [2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_block_is_lost_or_held_twice(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(3, 9))
    residency = Residency(12, num_blocks)
    slots = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)
    steps: list[Step] = []
    copies: list[tuple[str, object]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["step", "end", "fetch", "save", "copied", "forget"]))
        if action == "step":
            table = data.draw(slots)
            end = data.draw(st.integers((len(table) - 1) * SIZE + 1, len(table) * SIZE))
            try:
                steps.append(begin(residency, (table, data.draw(st.integers(0, end)), end)))
            except PoolFullError:
                continue
        elif action == "end" and steps:
            residency.end_step(steps.pop(data.draw(st.integers(0, len(steps) - 1))))
        elif action in ("fetch", "save"):
            copies.append((action, getattr(residency, f"begin_{action}")(data.draw(slots))))
        elif action == "copied" and copies:
            kind, made = copies.pop(data.draw(st.integers(0, len(copies) - 1)))
            getattr(residency, f"end_{kind}")(made)
        elif action == "forget":
            residency.forget(data.draw(slots))
        in_use = [block for step in steps for block in step.tables.ravel() if block != SPARE_BLOCK]
        assert not set(in_use) & set(residency._free)
    for step in steps:
        residency.end_step(step)
    for kind, made in copies:
        getattr(residency, f"end_{kind}")(made)
    residency.forget(range(12))
    held = residency._block_of[residency._block_of >= 0].tolist()
    assert sorted(held + residency._free) == list(range(1, num_blocks))
    assert not residency._num_uses.any()
