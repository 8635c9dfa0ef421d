"""Timing on a noisy machine: a pinned core, alternated rounds, percentiles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.cpus import parse_cpus
from scripts.benchmarks.progress import progress, say

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


def cpu_seconds_of_all() -> float:
    """CPU time that all processes of this machine have used, and that its host took from them."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        ticks = list(map(int, file.readline().split()[1:9]))
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def pin(core: int | None) -> int:
    """Keep this process on one core, the last it may use unless one is named; returns which."""
    chosen = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def all_cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


def core_list(text: str | None) -> list[int] | None:
    """Such as 0,1 or 0-3."""
    if text is None:
        return None
    return [core for part in text.split(",") for core in sorted(parse_cpus(part))]


@contextmanager
def on_cores(cores: Iterable[int] | None) -> Iterator[None]:
    """What is started meanwhile stays on these cores; None: on those that this process may use."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def collect(parts: Sequence[Callable[[], Mapping[K, float]]], rounds: int) -> dict[K, list[float]]:
    """The figures that the parts find, in each round; every other round runs them in the opposite
    order.

    A slow phase of the machine so falls on all parts. One more round comes first and is not kept.
    """
    found: dict[K, list[float]] = {}
    begun = time.perf_counter()
    with progress("rounds", rounds + 1) as advance:
        for number in range(rounds + 1):
            for part in parts if number % 2 == 0 else parts[::-1]:
                figures = part()
                if number:
                    for name, value in figures.items():
                        found.setdefault(name, []).append(value)
            advance()
            say(f"round {number} of {rounds}, after {time.perf_counter() - begun:.0f} s")
    return found


def alternate(parts: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each part in each round, as `collect` runs them."""
    return collect([partial(timed, *part) for part in parts.items()], rounds)


def timed(name: K, work: Callable[[], object]) -> dict[K, float]:
    """Seconds that the work takes, by its name."""
    return {name: seconds_of(work)}


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
