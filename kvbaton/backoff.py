"""How long to wait before something is tried again."""

from __future__ import annotations

import random

_FIRST_S = 0.05
_MOST_S = 1.0


def backoff_s(num_failures: int) -> float:
    """Doubles with each failure up to a second, and is only somewhere above half of that: those who
    lost the same gateway do not all come back at once."""
    pause_s: float = min(_FIRST_S * 2 ** min(num_failures, 10), _MOST_S)
    return pause_s * random.uniform(0.5, 1)  # noqa: S311 - nobody gains by guessing it
