"""Which prompts, and how much of each, the next step computes. Pure.

Prompts are served in the order they became ready, in chunks under a token budget for each step:
several short prompts share a step, a long one is spread over several (Sarathi-Serve, section 4.2).
A sequence stays in the line until its last token is computed.
"""

from __future__ import annotations

from common.worker.sequence import Sequence, plan_chunks


class PrefillScheduler:
    """The line of prompts of one prefill worker."""

    def __init__(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._budget = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._ready: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """The sequence has its blocks, and its cached ones can be read."""
        self._ready.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is computed or over."""
        if sequence in self._ready:
            self._ready.remove(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: sequences, and how many tokens of each."""
        return plan_chunks(self._ready[: self._max_num_seqs], self._budget)
