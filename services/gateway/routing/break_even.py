"""Whether a prompt's KV is worth moving to the decode worker that could compute it itself. Pure.

Where workers have memory of their own, KV goes from prefill to the store and from there to decode,
chunk by chunk while the rest is computed. Moving it saves the decode worker the computing; it costs
the time of the transfer. When that is longer, computing the prompt where it is needed is the better
use of both (the same comparison is Mooncake's for reuse: Qin et al., 2025, equation 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from common.transfer_rate import GUESSED_BYTES_PER_S
from services.gateway.routing.candidates import Candidate, Wanted


@dataclass(frozen=True, slots=True)
class Move:
    """What moving takes, for one pair of workers: `num_bytes` by the slower of the two ways, at
    `bytes_per_s`; `transfer_s` by both, of which `residue_s` are left when the prompt is computed.
    All 0 where nothing moves. The decode worker could have the prompt by itself in `local_s`."""

    num_bytes: int = 0
    bytes_per_s: float = 0.0
    transfer_s: float = 0.0
    residue_s: float = 0.0
    local_s: float = 0.0

    @property
    def pays(self) -> bool:
        """Whether the transfer takes no longer than that."""
        return self.transfer_s <= self.local_s


def expected_move(
    prefill: Candidate,
    decode: Candidate,
    wanted: Wanted,
    *,
    compute_s: float,
    num_chunks: int,
    local_s: float,
) -> Move:
    """What the pair has to move while prefill computes for `compute_s`, in so many chunks."""
    num_computed = wanted.num_uncached
    pushed = num_computed * wanted.token_bytes if prefill.moves else 0
    pulled = max(0, wanted.num_tokens - decode.num_held) * wanted.token_bytes if decode.moves else 0
    if not pushed and not pulled:
        return Move(local_s=local_s)
    push_rate = prefill.pushed_bytes_per_s or GUESSED_BYTES_PER_S
    pull_rate = decode.bytes_per_s or GUESSED_BYTES_PER_S
    push_s, pull_s = pushed / push_rate, pulled / pull_rate
    slower = (pushed, push_rate) if push_s > pull_s else (pulled, pull_rate)
    return Move(
        *slower,
        transfer_s=_passed(num_chunks, push_s, pull_s),
        residue_s=_passed(num_chunks, compute_s, push_s, pull_s) - compute_s,
        local_s=local_s,
    )


def _passed(num_chunks: int, *stages_s: float) -> float:
    """How long chunks of equal size take through stages that work on different ones at once: the
    first through each, the others behind each other through the slowest."""
    num_others = max(1, num_chunks) - 1
    return (sum(stages_s) + num_others * max(stages_s)) / (num_others + 1)
