"""What a load will take, from what the last ones took. Pure."""

from __future__ import annotations

from collections import deque
from statistics import StatisticsError, linear_regression

_NUM_LOADS = 32
_STALE_AFTER_S = 60.0


class LoadCost:
    """A line through (bytes, seconds) of the last loads: bandwidth and latency.

    What was measured too long ago counts as unknown: a disk that was slow for a while would never
    be tried again.
    """

    def __init__(self) -> None:
        self._loads: deque[tuple[int, float]] = deque(maxlen=_NUM_LOADS)
        self._measured_at = 0.0

    def observe(self, num_bytes: int, seconds: float, now: float) -> None:
        """A load of so many bytes took so long."""
        if self._is_stale(now):
            self._loads.clear()
        self._loads.append((num_bytes, seconds))
        self._measured_at = now

    def seconds_for(self, num_bytes: int, now: float) -> float | None:
        """What a load of so many bytes would take; None if nothing recent tells."""
        if not self._loads or self._is_stale(now):
            return None
        try:
            line = linear_regression(*zip(*self._loads, strict=True))
        except StatisticsError:  # too few, or all of one size
            line = None
        if line is None or line.slope <= 0 or line.intercept < 0:
            return num_bytes * self._seconds / self._bytes
        return line.intercept + num_bytes * line.slope

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of the last loads, latency included; 0 while unknown."""
        return self._bytes / self._seconds if self._seconds else 0.0

    @property
    def _bytes(self) -> int:
        return sum(num_bytes for num_bytes, _ in self._loads)

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds in self._loads)

    def _is_stale(self, now: float) -> bool:
        return now - self._measured_at > _STALE_AFTER_S
