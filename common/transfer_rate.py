"""How fast block bytes move between a worker and a store, as measured. Pure.

A move takes a time of its own and more for each byte: least squares with forgetting over the
latest tell them apart, so that many small moves do not make a fast link look slow.
"""

from __future__ import annotations

GUESSED_BYTES_PER_S = 1e9  # over loopback, before anything has moved

_KEPT = 0.9  # of the sums, at each busy time
_SPAN_BYTES = 64 * 1024 * 1024  # of a busy time that does not end
_DOUBLES_S = 30.0
_MOST_DOUBLINGS = 40.0


class TransferRate:
    """The rate of one direction. Moves that overlap share the link: what is measured are the times
    in which any was under way."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._began_at = 0.0  # the busy time
        self._num_bytes = 0  # in it
        self._measured_at = 0.0
        # Sums over busy times, of which older ones count less and less.
        self._n = self._x = self._xx = self._y = self._xy = 0.0  # x: bytes, y: seconds

    def begin(self, now: float) -> None:
        """A move begins."""
        if not self._num_under_way:
            self._began_at, self._num_bytes = now, 0
        self._num_under_way += 1

    def end(self, num_bytes: int, now: float) -> None:
        """One has ended that moved so many bytes. None tell nothing: all was there already."""
        self._num_under_way -= 1
        self._num_bytes += num_bytes
        is_over = not self._num_under_way or self._num_bytes >= _SPAN_BYTES
        if is_over and self._num_bytes:
            self._add(float(self._num_bytes), now - self._began_at, _KEPT / self._doubt(now))
            self._began_at, self._num_bytes, self._measured_at = now, 0, now

    def bytes_per_s(self, now: float) -> float:
        """0.0 before anything has moved. What was measured long ago is taken for too low, up to
        what is guessed of a link that nobody has tried: one that is avoided because it was slow
        would else never be found to be fast again."""
        rate = self._fitted()
        if not 0.0 < rate < GUESSED_BYTES_PER_S:
            return rate
        return min(rate * self._doubt(now), GUESSED_BYTES_PER_S)

    def _doubt(self, now: float) -> float:
        """From 1.0 on it doubles as time passes without a move."""
        return float(2.0 ** min((now - self._measured_at) / _DOUBLES_S, _MOST_DOUBLINGS))

    def _add(self, x: float, y: float, kept: float) -> None:
        products = (1.0, x, x * x, y, x * y)
        sums = (self._n, self._x, self._xx, self._y, self._xy)
        self._n, self._x, self._xx, self._y, self._xy = (
            kept * old + new for old, new in zip(sums, products, strict=True)
        )

    def _fitted(self) -> float:
        """From the slope of the best line with a start of its own, or else of the best through
        nothing: sizes are all alike, or time does not grow with them."""
        if not self._y:
            return 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-9 * self._n * self._xx:
            slope = (self._n * self._xy - self._x * self._y) / spread
            if slope > 0.0 and self._y >= slope * self._x:
                return 1 / slope
        return self._xx / self._xy
