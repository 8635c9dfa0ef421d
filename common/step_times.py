"""How long a worker's steps take, as it has measured: what it reports and others predict with."""

from __future__ import annotations

from typing import Annotated

import msgspec

PACED_SHARE = 0.9  # of a target per token, that steps may take which compute prompts too
FIRST_SHARE = 0.8  # of the time left for a first token, that its prompt may take between others

_SLACK = 2.0  # of what a prompt takes, that it can wait for shorter ones

Amount = Annotated[float, msgspec.Meta(ge=0)]


class StepTimes(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A step takes base_ms + token_ms for each token it computes + context_ms for each position
    that one of them attends to. `max_tokens`: the most that a step computes, 0 for any number.
    `full_tokens`: prompts join a step that has fewer, 0 for as many as it has room for."""

    base_ms: Amount = 0.0
    token_ms: Amount = 0.0
    context_ms: Amount = 0.0
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    full_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0

    def step_s(self, num_tokens: int, context: float) -> float:
        """One step over so many tokens, which attend to `context` positions in all."""
        return self._s(1, num_tokens, context)

    def prompt_s(self, num_tokens: int, context: float) -> float:
        """As many steps as so much of a prompt, or of several, needs."""
        return self._s(self.num_steps(num_tokens), num_tokens, context)

    def num_steps(self, num_tokens: int) -> int:
        """That so many of a prompt's tokens need, if they are alone."""
        return -(-num_tokens // (self.max_tokens or num_tokens or 1))

    def room_beside(self, num_tokens: int) -> int:
        """How many tokens of other prompts join the last step of one of so many."""
        if not self.max_tokens:
            return 0
        room = -num_tokens % self.max_tokens
        is_full = self.full_tokens and self.max_tokens - room >= self.full_tokens
        return 0 if is_full else room

    def _s(self, num_steps: int, num_tokens: int, context: float) -> float:
        ms = num_steps * self.base_ms + num_tokens * self.token_ms + context * self.context_ms
        return ms / 1000


def attended(num_tokens: int, start: int) -> float:
    """Positions that tokens from `start` on attend to: each to all before it and to itself."""
    return num_tokens * (start + (num_tokens + 1) / 2)


def mean(times: list[StepTimes]) -> StepTimes:
    """What to expect of a worker that has not computed anything yet, from others'."""
    num = len(times)
    return StepTimes(
        base_ms=sum(each.base_ms for each in times) / num,
        token_ms=sum(each.token_ms for each in times) / num,
        context_ms=sum(each.context_ms for each in times) / num,
        max_tokens=max(each.max_tokens for each in times),
        full_tokens=max(each.full_tokens for each in times),
    )


def due_at(arrived_at: float, prompt_s: float) -> float:
    """The order in which prompts are computed: a short one passes those that take much longer, and
    one that waited long is passed by nobody."""
    return arrived_at + _SLACK * prompt_s
