"""What became of each request of a load, and how many met their targets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Targets(msgspec.Struct, frozen=True):
    """Seconds to the first token and, on average, to each after it; and the share to meet both."""

    ttft_s: float
    tpot_s: float
    share: float = 0.9

    def __str__(self) -> str:
        return (
            f"TTFT {self.ttft_s:.3g} s, TPOT {round(self.tpot_s * 1000, 1):g} ms, {self.share:.0%}"
        )


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """One request. Seconds, counted from the moment at which it was to be sent.

    `at`: that moment, after the load's begin. `late_s`: how much later it was sent. `tpot_s`: mean
    gap between tokens after the first. `error`: why it has no answer; all else is then 0.
    """

    at: float
    late_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    worst_gap_s: float = 0.0
    e2e_s: float = 0.0
    num_tokens: int = 0
    error: str = ""

    def meets(self, targets: Targets) -> bool:
        """Both of them; what failed meets none."""
        in_time = self.ttft_s <= targets.ttft_s and self.tpot_s <= targets.tpot_s
        return in_time and not self.error


def attainment(outcomes: Sequence[Outcome], num_asked: int, targets: Targets) -> float:
    """The share of all requests that met both targets; one without an outcome did not."""
    return sum(outcome.meets(targets) for outcome in outcomes) / num_asked


def most_missed(num_asked: int, share: float) -> int:
    """How many may miss their targets if `share` of them are to meet them."""
    return int(num_asked * (1 - share) + 1e-9)
