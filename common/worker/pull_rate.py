"""How fast block bytes come to a worker. Pure."""

from __future__ import annotations

_KEPT = 0.9  # of the sums, at each pull


class PullRate:
    """Bytes over the time they took, of which older pulls count less and less."""

    def __init__(self) -> None:
        self._num_bytes = 0.0
        self._took_s = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0.0 before anything was pulled."""
        return self._num_bytes / self._took_s if self._took_s else 0.0

    def add(self, num_bytes: int, took_s: float) -> None:
        """A pull has ended; one that found all it wanted here tells nothing."""
        if num_bytes:
            self._num_bytes = _KEPT * self._num_bytes + num_bytes
            self._took_s = _KEPT * self._took_s + took_s
