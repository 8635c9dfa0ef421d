"""Decode steps by value: growth, preemption, chunks; and that the oldest always goes on."""

from __future__ import annotations

import math
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from common.worker.lease import BlockLease
from common.worker.sequence import Sequence
from services.decode.scheduler import DecodeScheduler, Plan
from tests.unit.sequences import sequence_of


def running(arrived_at: float, num_computed: int, num_blocks: int, store: int = 0) -> Sequence:
    """One token is to be computed; blocks are of two."""
    sequence = sequence_of(num_computed + 1, arrived_at=arrived_at, store=store)
    sequence.num_computed = num_computed
    sequence.blocks = list(range(num_blocks))
    return sequence


def scheduler_of(*sequences: Sequence, budget: int = 16) -> DecodeScheduler:
    scheduler = DecodeScheduler(budget, block_size=2)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def lease_of(*blocks: int, starved: bool = False) -> BlockLease:
    lease = BlockLease()
    lease.add(list(blocks))
    lease.starved = starved
    return lease


# ---- growth -------------------------------------------------------------------------------------


def test_a_sequence_with_room_in_its_last_block_takes_none() -> None:
    sequence, lease = running(1, 3, 2), lease_of(9)
    assert scheduler_of(sequence).plan([lease]) == Plan(steps=[(sequence, 1)])
    assert (sequence.blocks, len(lease)) == ([0, 1], 1)


def test_a_sequence_whose_blocks_are_full_takes_one_from_the_lease() -> None:
    sequence, lease = running(1, 4, 2), lease_of(9)
    assert scheduler_of(sequence).plan([lease]) == Plan(steps=[(sequence, 1)])
    assert (sequence.blocks, len(lease)) == ([0, 1, 9], 0)


def test_a_sequence_without_a_block_sits_the_step_out() -> None:
    first, second = running(1, 4, 2), running(2, 3, 2)
    assert scheduler_of(first, second).plan([lease_of()]) == Plan(steps=[(second, 1)])


def test_the_oldest_is_served_first() -> None:
    young, old = running(2, 4, 2), running(1, 4, 2)
    assert scheduler_of(young, old).plan([lease_of(9)]) == Plan(steps=[(old, 1)])
    assert old.blocks == [0, 1, 9]


def test_each_sequence_grows_from_the_lease_of_its_own_store() -> None:
    sequence = running(1, 4, 2, store=1)
    plan = scheduler_of(sequence).plan([lease_of(8), lease_of(9)])
    assert plan == Plan(steps=[(sequence, 1)])
    assert sequence.blocks == [0, 1, 9]


# ---- preemption ---------------------------------------------------------------------------------


def test_when_the_store_has_no_more_the_youngest_gives_way() -> None:
    old, middle, young = running(1, 4, 2), running(2, 3, 2), running(3, 3, 2)
    lease = lease_of(starved=True)
    plan = scheduler_of(middle, young, old).plan([lease])
    assert plan == Plan(steps=[(middle, 1)], preempted=[young])
    assert not lease.starved


def test_one_sequence_a_step_gives_way() -> None:
    sequences = [running(index, 4, 2) for index in range(4)]
    assert scheduler_of(*sequences).plan([lease_of(starved=True)]).preempted == [sequences[3]]


def test_the_last_one_gives_way_itself() -> None:
    sequence = running(1, 4, 2)
    plan = scheduler_of(sequence).plan([lease_of(starved=True)])
    assert plan == Plan(preempted=[sequence])


def test_nobody_gives_way_while_everyone_has_room() -> None:
    sequence = running(1, 3, 2)
    assert scheduler_of(sequence).plan([lease_of(starved=True)]).preempted == []


def test_only_sequences_of_the_store_that_is_full_give_way() -> None:
    here, there = running(1, 4, 2), running(2, 3, 2, store=1)
    plan = scheduler_of(here, there).plan([lease_of(starved=True), lease_of()])
    assert plan == Plan(steps=[(there, 1)], preempted=[here])


def test_a_prompt_under_way_may_be_the_one_that_gives_way() -> None:
    old, prompt = running(1, 4, 2), sequence_of(6, arrived_at=2)
    assert scheduler_of(old, prompt).plan([lease_of(starved=True)]) == Plan(preempted=[prompt])


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_get_what_the_running_leave_of_the_budget() -> None:
    one, prompt = running(1, 3, 2), sequence_of(9, arrived_at=2)
    plan = scheduler_of(one, prompt, budget=5).plan([lease_of()])
    assert plan.steps == [(one, 1), (prompt, 4)]


def test_every_running_sequence_gets_its_token_whatever_the_budget() -> None:
    sequences = [running(index, 3, 2) for index in range(3)]
    prompt = sequence_of(9, arrived_at=9)
    plan = scheduler_of(*sequences, prompt, budget=2).plan([lease_of()])
    assert plan.steps == [(sequence, 1) for sequence in sequences]


def test_the_load_counts_prompt_tokens_and_no_others() -> None:
    scheduler = scheduler_of(running(1, 3, 2), sequence_of(9, arrived_at=2), running(3, 3, 2, 1))
    assert sum(each.num_uncomputed for each in scheduler.prompts()) == 9
    assert (len(scheduler), scheduler.num_active(0), scheduler.num_active(1)) == (3, 2, 1)


def test_a_removed_sequence_is_planned_no_more() -> None:
    sequence = running(1, 3, 2)
    scheduler = scheduler_of(sequence)
    scheduler.remove(sequence)
    scheduler.remove(sequence)
    assert scheduler.plan([lease_of()]) == Plan()
    assert len(scheduler) == 0


# ---- all together -------------------------------------------------------------------------------


class Simulation:
    """A scheduler on a store of `num_blocks`, which gives a lease while it can and takes suspended
    sequences back, first come first, once there is room for all their tokens and one block more."""

    def __init__(self, lengths: list[tuple[int, int]], num_blocks: int, budget: int) -> None:
        self.num_free = num_blocks
        self.budget = budget
        self.lease = BlockLease()
        self.scheduler = DecodeScheduler(budget, block_size=2)
        self.active: list[Sequence] = []
        self.ends: dict[Sequence, int] = {}
        self.num_preempted = 0
        self.waiting: deque[Sequence] = deque()
        for index, (num_tokens, num_outputs) in enumerate(lengths):
            sequence = sequence_of(num_tokens, arrived_at=index)
            self.ends[sequence] = num_tokens + num_outputs
            self.waiting.append(sequence)

    def step(self) -> list[Sequence]:
        """One step; returns the sequences that advanced."""
        self.admit()
        plan = self.scheduler.plan([self.lease])
        for sequence in plan.preempted:
            self.num_preempted += 1
            self.leave(sequence)
            self.waiting.appendleft(sequence)
        num_wanted = self.lease.num_wanted(len(self.active))
        if num_wanted:
            num_leased = min(num_wanted, self.num_free)
            self.num_free -= num_leased
            self.lease.add([0] * num_leased)
            self.lease.starved = not num_leased and not len(self.lease)
        self.check(plan)
        for sequence, count in plan.steps:
            sequence.num_computed += count
            if not sequence.num_uncomputed:
                sequence.tokens.append(7)
            if len(sequence.tokens) > self.ends[sequence]:
                self.leave(sequence)
        self.num_free += len(self.lease.surplus(len(self.active)))
        return [sequence for sequence, _ in plan.steps]

    def admit(self) -> None:
        while self.waiting:
            needed = -(-len(self.waiting[0].tokens) // 2)
            if needed + bool(self.active) > self.num_free:
                return
            self.num_free -= needed
            sequence = self.waiting.popleft()
            sequence.blocks, sequence.num_computed = [0] * needed, 0
            self.active.append(sequence)
            self.scheduler.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Full blocks become cache, which counts as free; the last one joins the lease."""
        self.active.remove(sequence)
        self.scheduler.remove(sequence)
        num_full = sequence.num_computed // 2
        self.num_free += num_full
        self.lease.add(sequence.blocks[num_full:])
        sequence.blocks = []

    def check(self, plan: Plan) -> None:
        planned = [sequence for sequence, _ in plan.steps]
        assert len(set(planned)) == len(planned)
        num_prompt = sum(count for each, count in plan.steps if each.num_uncomputed > 1)
        num_running = sum(each.num_uncomputed == 1 for each in planned)
        assert num_prompt <= max(0, self.budget - num_running)
        for sequence, count in plan.steps:
            assert sequence in self.active
            assert sequence.num_computed + count <= len(sequence.blocks) * 2
        for victim in plan.preempted:
            assert all(each.arrived_at <= victim.arrived_at for each in self.active)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(0, 10),
    st.integers(8, 24),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_sequence_ends_and_the_oldest_is_never_stuck(
    lengths: list[tuple[int, int]], num_spare: int, budget: int
) -> None:
    longest = max(-(-sum(each) // 2) for each in lengths)
    simulation = Simulation(lengths, longest + 1 + num_spare, budget)
    num_idle = 0
    while simulation.active or simulation.waiting:
        oldest = min([*simulation.active, *simulation.waiting], key=lambda each: each.arrived_at)
        num_idle = 0 if oldest in simulation.step() else num_idle + 1
        assert num_idle <= 3 * len(lengths)  # one victim a step, and a step for the answer
        assert len(simulation.scheduler) == len(simulation.active)
    assert simulation.num_free == longest + 1 + num_spare


def test_sequences_that_cannot_all_grow_give_way_and_come_back() -> None:
    simulation = Simulation([(4, 8), (4, 8), (4, 8)], num_blocks=8, budget=16)
    while simulation.active or simulation.waiting:
        simulation.step()
    assert simulation.num_preempted > 0
    assert all(len(sequence.tokens) == 13 for sequence in simulation.ends)


def test_prompts_get_what_the_pace_of_others_leaves() -> None:
    old, young = running(1, 3, 2), sequence_of(20, arrived_at=2)
    for allowed, num_tokens in ((math.inf, 15), (7.9, 7), (2, 2), (100, 15)):
        plan = scheduler_of(old, young).plan([lease_of()], allowed)
        assert plan.steps == [(old, 1), (young, num_tokens)]
