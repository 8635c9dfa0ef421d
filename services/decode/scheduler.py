"""Which sequences the next step advances, and who must give way when blocks run out. Pure.

Every running sequence gets one token a step; what is left of the step's token budget, and of the
time that running ones may be kept waiting (pace.py), goes to prompts that this worker computes
itself, chunk by chunk (Sarathi-Serve, section 4.2). A sequence that needs a block takes it from the
lease. When the store has no more, the youngest gives way: its blocks become cache that can be
evicted, and it goes on later from what is left of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from common.worker.lease import BlockLease
from common.worker.sequence import Sequence, plan_chunks


@dataclass(slots=True)
class Plan:
    """Sequences with how many tokens of each, and those that must give way."""

    steps: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class DecodeScheduler:
    """The sequences of one decode worker that have blocks, oldest first."""

    def __init__(
        self, max_num_batched_tokens: int, block_size: int, full_step_tokens: float = math.inf
    ) -> None:
        self._full_step_tokens = full_step_tokens
        self._budget = max_num_batched_tokens
        self._block_size = block_size
        self._active: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._active)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._active

    def is_running(self, sequence: Sequence) -> bool:
        """Whether it is computed up to its newest token."""
        return sequence in self._active and sequence.num_uncomputed == 1

    def add(self, sequence: Sequence) -> None:
        """The sequence has blocks for all its tokens, and those that are final can be read."""
        self._active.append(sequence)
        self._active.sort(key=lambda each: each.arrived_at)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over, or gives way."""
        if sequence in self._active:
            self._active.remove(sequence)

    def num_active(self, store: int) -> int:
        """Sequences whose blocks one store holds."""
        return sum(sequence.store == store for sequence in self._active)

    def prompts(self) -> list[Sequence]:
        """Those that are not computed up to their newest token."""
        return [sequence for sequence in self._active if sequence.num_uncomputed > 1]

    def running(self) -> list[Sequence]:
        """Those that are computed up to their newest token."""
        return [sequence for sequence in self._active if sequence.num_uncomputed == 1]

    def num_context_tokens(self) -> int:
        """Positions that the next token of each running sequence attends to."""
        return sum(len(sequence.tokens) for sequence in self.running())

    def plan(self, leases: Many[BlockLease], max_prompt_tokens: float = math.inf) -> Plan:
        """The next step, with so many tokens of prompts. A sequence without a block for its next
        token sits it out."""
        plan = self.plan_tokens(leases)
        prompts = [sequence for sequence in self.prompts() if sequence not in plan.preempted]
        left = self._budget - len(plan.steps)
        room = int(min(left, max_prompt_tokens))
        plan.steps += plan_chunks(prompts, room, self._full_step_tokens)
        return plan

    def plan_tokens(self, leases: Many[BlockLease]) -> Plan:
        """The next step without prompts."""
        plan = Plan()
        for sequence in self._active:
            if sequence.num_uncomputed > 1 or sequence in plan.preempted:
                continue
            lease = leases[sequence.store]
            if self._grow(sequence, lease):
                plan.steps.append((sequence, 1))
            elif lease.starved:
                lease.starved = False  # what is given up now is worth asking for
                plan.preempted.append(self._youngest(sequence.store))
        return plan

    def _grow(self, sequence: Sequence, lease: BlockLease) -> bool:
        """Whether the sequence has a block for its next position, if need be from the lease."""
        if sequence.num_computed < len(sequence.blocks) * self._block_size:
            return True
        block = lease.take()
        if block is None:
            return False
        sequence.grow(block)
        return True

    def _youngest(self, store: int) -> Sequence:
        return next(sequence for sequence in reversed(self._active) if sequence.store == store)
