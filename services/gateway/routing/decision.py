"""What placement considered for a request, what it expected of it, and why it chose. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ALTERNATIVES = 8  # that a decision remembers


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where KV moves: what bringing a prompt's to the decode worker takes, beside what that one
    needs to compute it. `num_bytes` go the slower of the ways to the store and from there, at
    `bytes_per_s`; `transfer_ms` for both, of which `residue_ms` are left when the prompt is
    computed. Moving pays while it does not take longer than `local_ms`."""

    num_bytes: int
    bytes_per_s: float
    transfer_ms: float
    residue_ms: float
    local_ms: float
    pays: bool


@dataclass(frozen=True, slots=True)
class Option:
    """A pair of workers that could have served the request; `prefill` is `decode` where the decode
    worker computes the prompt itself.

    The time to the first token is expected to be `line_ms` in this gateway's own line, `queue_ms`
    behind the prompts that the worker has, `transfer_ms` for cached blocks that it must fetch, and
    `compute_ms` for the rest. `break_even` is the pair's or, where decode computes the prompt
    itself, that of the soonest pair with it; None where nothing moves.
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
    break_even: BreakEven | None = None

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
