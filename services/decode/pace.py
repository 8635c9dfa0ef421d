"""How long a step may take so that what runs keeps to its targets for the time per token. Pure.

A step that computes a prompt beside running sequences is as long as its chunk makes it, and each of
them waits for it (Sarathi-Serve, section 4.2, sizes chunks so, for one target set in advance). Here
each request has its own: no step is to exceed the strictest, or what is left of it to a sequence
that is late, so that it can catch up.

Prompts have targets, too: where a step has little room for them they get what they need to be in
time, up to a block, and so that none waits for ever a few tokens at any rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from common.step_times import PACED_SHARE
from common.worker.sequence import Sequence

_LEAST_TOKENS = 2  # of a prompt in a step; one could not be told from a token that follows others


@dataclass(slots=True)
class _Pace:
    """What may lie between two tokens, and since when one was waited for after the first."""

    planned_s: float
    since: float = math.nan
    num_before: int = 0

    def limit_s(self, now: float, num_outputs: int) -> float:
        if math.isnan(self.since):
            return self.planned_s
        num_due = max(0, num_outputs - self.num_before) + 1
        return min(self.planned_s, num_due * self.planned_s - (now - self.since))


class Paces:
    """Of the sequences of one decode worker that have targets."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}  # by handoff id

    def add(self, handoff_id: str, target_s: float) -> None:
        """A request came. `target_s` for each token after the first; 0: any time."""
        if target_s:
            self._paces[handoff_id] = _Pace(PACED_SHARE * target_s)

    def begin(self, sequence: Sequence, num_outputs: int, now: float) -> None:
        """So many of its tokens are out, and the next one is waited for; told once, or again."""
        pace = self._paces.get(sequence.handoff_id)
        if pace is not None and math.isnan(pace.since):
            pace.since, pace.num_before = now, num_outputs

    def remove(self, handoff_id: str) -> None:
        """The request is over."""
        self._paces.pop(handoff_id, None)

    def planned_s(self, sequences: Iterable[Sequence]) -> float:
        """How long a step for these takes while none is late; inf where none has a target."""
        known = (self._paces.get(each.handoff_id) for each in sequences)
        return min((pace.planned_s for pace in known if pace), default=math.inf)

    def limit_s(self, sequences: Iterable[Sequence], now: float) -> float:
        """How long a step may take that gives these their next token, or keeps those waiting that
        are not here yet. Not above 0 where one is too late already, inf where none has a target."""
        known = [(each, self._paces.get(each.handoff_id)) for each in sequences]
        limits = [pace.limit_s(now, each.num_outputs) for each, pace in known if pace]
        return min(limits, default=math.inf)


def least_prompt_tokens(
    prompts: Iterable[Sequence], step_s: float, now: float, *, most: int
) -> int:
    """How many tokens of prompts a step computes whatever it makes others wait, at most `most`: so
    many that each of them, in this order, is computed when it is due, by steps of `step_s`."""
    least, num_tokens = min(_LEAST_TOKENS, most), 0
    for prompt in prompts:
        num_tokens += prompt.num_uncomputed
        left_s = prompt.first_due_at - now
        if left_s * most <= num_tokens * step_s:
            return most
        least = max(least, math.ceil(num_tokens * step_s / left_s))
    return least
