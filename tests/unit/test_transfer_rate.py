"""How fast bytes move, from the moves that were seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transfer_rate import GUESSED_BYTES_PER_S, TransferRate


class Moves:
    """Moves one after another, on a clock of their own."""

    def __init__(self) -> None:
        self.rate = TransferRate()
        self.now = 5.0

    def move(self, num_bytes: int, took_s: float) -> None:
        self.rate.begin(self.now)
        self.now += took_s
        self.rate.end(num_bytes, self.now)

    @property
    def bytes_per_s(self) -> float:
        return self.rate.bytes_per_s(self.now)


def test_nothing_is_known_before_something_has_moved() -> None:
    moves = Moves()
    assert moves.bytes_per_s == 0.0
    moves.move(0, 5.0)  # all was there
    assert moves.bytes_per_s == 0.0
    moves.move(1000, 1.0)
    assert moves.bytes_per_s == pytest.approx(1000)


def test_the_latest_count_most() -> None:
    moves = Moves()
    for took_s in [1.0] * 20 + [2.0] * 50:
        moves.move(1000, took_s)
    assert moves.bytes_per_s == pytest.approx(500, rel=0.02)


@given(
    base_s=st.floats(0, 0.05),
    rate=st.floats(1e5, 9e8),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=30),
)
def test_what_each_move_takes_by_itself_is_not_the_rate(
    base_s: float, rate: float, sizes: list[int]
) -> None:
    moves = Moves()
    for size in [10, *sizes, 1000]:
        moves.move(size * 10_000, base_s + size * 10_000 / rate)
    assert moves.bytes_per_s == pytest.approx(rate, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 100)), max_size=40))
def test_whatever_was_seen_the_rate_is_a_rate(seen: list[tuple[int, float]]) -> None:
    moves = Moves()
    for num_bytes, took_s in seen:
        moves.move(num_bytes, took_s)
    later = moves.rate.bytes_per_s(moves.now + 1e9)
    assert 0.0 <= moves.bytes_per_s <= max(later, moves.bytes_per_s) < float("inf")


def test_moves_that_overlap_share_the_link() -> None:
    rate = TransferRate()
    for start in range(0, 40, 4):  # three at a time, all on their way for as long
        for _ in range(3):
            rate.begin(float(start))
        for _ in range(3):
            rate.end(1000, float(start + 3))
    assert rate.bytes_per_s(39.0) == pytest.approx(1000)


def test_a_busy_time_that_never_ends_is_measured_in_parts() -> None:
    rate, size = TransferRate(), 32 * 1024 * 1024
    rate.begin(0.0)
    for second in range(1, 50):
        rate.begin(float(second))
        rate.end(size, float(second))
    assert rate.bytes_per_s(48.0) == pytest.approx(size)


def test_what_was_measured_long_ago_is_taken_for_too_low_but_not_for_more_than_a_guess() -> None:
    slow, fast = Moves(), Moves()
    slow.move(1_000_000, 1.0)
    fast.move(1_000_000, 1e-4)
    assert slow.rate.bytes_per_s(slow.now + 30) == pytest.approx(2e6)
    assert slow.rate.bytes_per_s(slow.now + 60) == pytest.approx(4e6)
    assert slow.rate.bytes_per_s(slow.now + 1e6) == GUESSED_BYTES_PER_S
    assert fast.rate.bytes_per_s(fast.now + 1e6) == pytest.approx(1e10)
