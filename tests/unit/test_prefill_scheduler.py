"""The line of prompts by value: in order, in chunks, under a budget."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from common.worker.sequence import Sequence, plan_chunks
from services.prefill.scheduler import PrefillScheduler
from tests.unit.sequences import sequence_of


def scheduler_of(*sequences: Sequence, max_num_seqs: int = 8) -> PrefillScheduler:
    scheduler = PrefillScheduler(max_num_seqs)
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    return scheduler


def plan_of(
    scheduler: PrefillScheduler, budget: int, others: Iterable[tuple[float, Sequence]] = ()
) -> list[tuple[Sequence, int]]:
    return plan_chunks(scheduler.line(others), budget)


def test_short_prompts_share_a_step() -> None:
    first, second = sequence_of(3), sequence_of(4)
    assert plan_of(scheduler_of(first, second), 10) == [(first, 3), (second, 4)]


def test_a_long_prompt_is_spread_over_steps() -> None:
    sequence = sequence_of(10)
    scheduler = scheduler_of(sequence)
    chunks = []
    while sequence.num_uncomputed:
        [(_, count)] = plan_of(scheduler, 4)
        sequence.num_computed += count
        chunks.append(count)
    assert chunks == [4, 4, 2]


def test_what_is_cached_is_not_computed() -> None:
    sequence = sequence_of(10)
    sequence.num_computed = 8
    assert plan_of(scheduler_of(sequence), 5) == [(sequence, 2)]


def test_a_prompt_that_is_removed_makes_room_for_the_next() -> None:
    first, second = sequence_of(10), sequence_of(4)
    scheduler = scheduler_of(first, second)
    scheduler.remove(first)
    scheduler.remove(first)
    assert plan_of(scheduler, 5) == [(second, 4)]


def test_no_more_sequences_than_allowed_share_a_step() -> None:
    sequences = [sequence_of(1) for _ in range(4)]
    plan = plan_of(scheduler_of(*sequences, max_num_seqs=3), 100)
    assert [sequence for sequence, _ in plan] == sequences[:3]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 16), st.integers(1, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_prompt_is_computed_once_in_order_and_under_the_budget(
    num_tokens: list[int], budget: int, max_num_seqs: int
) -> None:
    sequences = [sequence_of(count) for count in num_tokens]
    scheduler = scheduler_of(*sequences, max_num_seqs=max_num_seqs)
    done = []
    while plan := plan_of(scheduler, budget):
        assert sum(count for _, count in plan) <= budget
        assert len(plan) <= max_num_seqs
        for sequence, count in plan:
            sequence.num_computed += count
            if not sequence.num_uncomputed:
                scheduler.remove(sequence)
                done.append(sequence)
    assert done == sequences
    assert all(sequence.num_uncomputed == 0 for sequence in sequences)


def test_what_is_due_first_is_computed_first_also_between_two_chunks() -> None:
    long, short = sequence_of(10), sequence_of(3)
    scheduler = PrefillScheduler(8)
    scheduler.add(long, 20.0)
    assert plan_of(scheduler, 4) == [(long, 4)]
    long.num_computed = 4
    scheduler.add(short, 7.0)
    assert plan_of(scheduler, 4) == [(short, 3), (long, 1)]


def test_prompts_that_stay_here_have_their_turn_among_the_others() -> None:
    first, kept, last = sequence_of(3), sequence_of(3), sequence_of(3)
    scheduler = PrefillScheduler(8)
    scheduler.add(first, 1.0)
    scheduler.add(last, 3.0)
    assert plan_of(scheduler, 8, [(2.0, kept)]) == [(first, 3), (kept, 3), (last, 2)]
    assert plan_of(scheduler, 8) == [(first, 3), (last, 3)]
