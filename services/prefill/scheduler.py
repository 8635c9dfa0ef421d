"""Whose prompts the next step computes. Pure.

Prompts are computed in chunks under a token budget for each step: short prompts share a step until
it keeps the arithmetic busy, a long one is spread over several (Sarathi-Serve, section 4.2). They
are served in the order in which they are due (common/step_times.py), so between two chunks of a
long prompt short ones that came later have their turn, and nobody starves.
A sequence stays in the line until its last token is computed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import itemgetter

from common.worker.sequence import Sequence


class PrefillScheduler:
    """The line of prompts of one prefill worker."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._ready: list[tuple[float, Sequence]] = []  # the first due first

    def add(self, sequence: Sequence, due_at: float) -> None:
        """The sequence has its blocks, and its cached ones can be read."""
        insort(self._ready, (due_at, sequence), key=itemgetter(0))

    def remove(self, sequence: Sequence) -> None:
        """The sequence is computed or over."""
        self._ready = [ready for ready in self._ready if ready[1] is not sequence]

    def line(self, others: Iterable[tuple[float, Sequence]] = ()) -> list[Sequence]:
        """Whose turn it is in the next step, the first due first. `others` are not in the line, but
        have their turn as if they were."""
        line = sorted([*self._ready, *others], key=itemgetter(0))
        return [sequence for _, sequence in line[: self._max_num_seqs]]
