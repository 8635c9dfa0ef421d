"""What a load will take: unknown, known, and forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kvstore.disk.cost import LoadCost


def test_at_first_nothing_is_known() -> None:
    assert LoadCost().seconds_for(100, 0.0) is None
    assert LoadCost().bytes_per_s == 0


def test_one_measurement_tells_the_bandwidth() -> None:
    cost = LoadCost()
    cost.observe(1000, 2.0, now=0.0)
    assert cost.bytes_per_s == 500
    assert cost.seconds_for(250, 0.0) == 0.5


@given(st.floats(0, 1), st.floats(1e-9, 1e-3), st.sets(st.integers(1, 10**6), min_size=2))
def test_latency_and_bandwidth_are_told_apart(
    latency_s: float, slope: float, sizes: set[int]
) -> None:
    cost = LoadCost()
    for size in sizes:
        cost.observe(size, latency_s + size * slope, now=0.0)
    expected = pytest.approx(latency_s + 500_000 * slope, rel=0.01)
    if slope * (max(sizes) - min(sizes)) > 1e-6:  # beyond the rounding of the sums
        assert cost.seconds_for(500_000, 0.0) == expected


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 100)), min_size=1))
def test_whatever_was_measured_the_answer_is_a_time(loads: list[tuple[int, float]]) -> None:
    cost = LoadCost()
    for num_bytes, seconds in loads:
        cost.observe(num_bytes, seconds, now=0.0)
    expected = cost.seconds_for(10**6, 0.0)
    assert expected is not None
    assert expected >= 0


def test_old_measurements_are_forgotten() -> None:
    cost = LoadCost()
    cost.observe(1000, 1e6, now=0.0)
    assert cost.seconds_for(1, 61.0) is None
    cost.observe(1000, 1.0, now=61.0)
    assert cost.seconds_for(1000, 61.0) == 1.0


def test_the_last_loads_count() -> None:
    cost = LoadCost()
    for seconds in [9.0] * 40 + [1.0] * 32:
        cost.observe(1000, seconds, now=0.0)
    assert cost.seconds_for(1000, 0.0) == 1.0
