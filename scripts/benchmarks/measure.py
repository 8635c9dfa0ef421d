"""Timing on a noisy machine: a pinned core, alternated rounds, percentiles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Percentiles of repeated measurements."""

    p10: float
    median: float
    p90: float
    count: int

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """Such as 92.1 (90.3 to 101.2), in units of 1 / scale."""
        p10, median, p90 = (
            f"{value * scale:.{digits}f}" for value in (self.p10, self.median, self.p90)
        )
        return f"{median} ({p10} to {p90})"


def spread(values: Iterable[float]) -> Spread:
    """The 10th, 50th and 90th percentile of at least one value."""
    found = list(values)
    p10, median, p90 = np.percentile(found, (10, 50, 90))
    return Spread(float(p10), float(median), float(p90), len(found))


def pin(core: int | None) -> int:
    """Keep this process on one core, the last it may use unless one is named; returns which."""
    chosen = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def alternate(parts: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each part in each round; every other round runs them in the opposite order.

    A slow phase of the machine so falls on all parts. One more round comes first and is not kept.
    """
    seconds: dict[K, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        order = list(parts) if number % 2 == 0 else list(parts)[::-1]
        for name in order:
            begun = time.perf_counter()
            parts[name]()
            elapsed = time.perf_counter() - begun
            if number:
                seconds[name].append(elapsed)
    return seconds
