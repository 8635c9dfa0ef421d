"""What placement considered for a request, what it expected of it, and why it chose. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ALTERNATIVES = 8  # that a decision remembers


@dataclass(frozen=True, slots=True)
class Option:
    """A pair of workers that could have served the request; `prefill` is `decode` where the decode
    worker computes the prompt itself.

    The time to the first token is expected to be `line_ms` in this gateway's own line, `queue_ms`
    behind the prompts that the worker has, `transfer_ms` for cached blocks that it must fetch, and
    `compute_ms` for the rest.
    """

    prefill: str
    decode: str
    line_ms: float
    queue_ms: float
    transfer_ms: float
    compute_ms: float
    tpot_ms: float
    num_cached_tokens: int
    meets_targets: bool

    @property
    def ttft_ms(self) -> float:
        """When the first token is expected, from the request's coming."""
        return self.line_ms + self.queue_ms + self.transfer_ms + self.compute_ms


@dataclass(frozen=True, slots=True)
class Decision:
    """The placement of one attempt. `reason` says in words why `chosen` was; `alternatives` are
    the best of the others, in the order in which they would have been taken."""

    chosen: Option
    reason: str
    num_considered: int
    alternatives: tuple[Option, ...] = ()

    @property
    def is_prefilled_by_decode(self) -> bool:
        """Whether the decode worker computes the prompt itself."""
        return self.chosen.prefill == self.chosen.decode
