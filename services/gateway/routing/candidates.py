"""A request and a worker as placement sees them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from common.step_times import StepTimes
from common.transfer_rate import GUESSED_BYTES_PER_S
from services.gateway.routing.estimates import Backlog


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as placement sees it. Of its `num_tokens` the first `num_cached` are in the store;
    `waited_s` since it came."""

    num_tokens: int
    num_cached: int = 0
    token_bytes: int = 0
    num_answer_tokens: int = 1
    ttft_target_s: float = 0.0  # both 0.0: none
    tpot_target_s: float = 0.0
    waited_s: float = 0.0
    session: tuple[str, ...] = ()  # names of the workers that served its session last

    @property
    def num_uncached(self) -> int:
        """Tokens to compute."""
        return self.num_tokens - self.num_cached


@dataclass(slots=True)
class Candidate:
    """A worker as placement sees it. Sequences are those that it decodes, or is to decode.

    Counts are the larger of what the worker reported and what this gateway knows it has given it:
    reports are late, and other gateways use the worker too.
    """

    name: str
    num_sequences: int
    max_num_seqs: int
    num_awaited: int = 0  # of its sequences, those whose prompts are still to be computed
    num_context_tokens: int = 0  # of all its sequences
    backlog: Backlog = field(default_factory=Backlog)
    others_s: float = 0.0  # what it has to compute for other gateways
    prompt_steps: StepTimes | None = None
    token_steps: StepTimes | None = None
    moves: bool = False  # it has memory of its own, where blocks must come to
    bytes_per_s: float = 0.0  # at which they come; 0.0: not known
    pushed_bytes_per_s: float = 0.0  # at which they go to the store
    num_held: int = 0  # of the request's cached tokens, those that are there
    paced_token_s: float = 0.0  # one more token of a prompt in its steps; 0.0: not known
    tpot_limit_s: float = math.inf  # the strictest target of those that run there
    may_keep: bool = False  # a prefill worker that can decode what it has computed
    num_placed: int = 0  # ever, by this gateway: turns among equals

    @property
    def is_full(self) -> bool:
        return self.num_sequences >= self.max_num_seqs

    @property
    def crowding(self) -> float:
        """0.0 while it has a place, else how many it has for each: the line at its door."""
        return self.num_sequences / self.max_num_seqs if self.is_full else 0.0

    def transfer_s(self, num_tokens: int, token_bytes: int) -> float:
        """How long the blocks of so many tokens take to get there, beside those it has."""
        if not self.moves:
            return 0.0
        num_bytes = max(0, num_tokens - self.num_held) * token_bytes
        return num_bytes / (self.bytes_per_s or GUESSED_BYTES_PER_S)
