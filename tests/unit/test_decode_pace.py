"""How long steps may take that keep running sequences waiting: by value, and that all keep up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.step_times import PACED_SHARE
from common.worker.sequence import Sequence
from services.decode.pace import Paces
from tests.unit.sequences import sequence_of

PLANNED_S = PACED_SHARE * 0.1


def running(num_outputs: int, name: str = "a") -> Sequence:
    sequence = sequence_of(8 + num_outputs, handoff_id=name)
    sequence.num_prompt_tokens = 8
    return sequence


def paces_of(*names: str) -> Paces:
    paces = Paces()
    for name in names:
        paces.add(name, 0.1)
    return paces


def test_without_targets_a_step_may_take_any_time() -> None:
    paces = Paces()
    paces.add("a", 0.0)
    paces.begin(running(1), 1, 5.0)
    assert paces.limit_s([running(1)], 9.0) == math.inf


def test_one_that_is_not_here_yet_is_not_kept_waiting_for_longer_either() -> None:
    assert paces_of("a").limit_s([running(0)], 9.0) == pytest.approx(PLANNED_S)


def test_what_was_saved_is_not_spent_at_once() -> None:
    paces = paces_of("a")
    paces.begin(running(1), 1, 5.0)
    assert paces.limit_s([running(30)], 5.1) == pytest.approx(PLANNED_S)


def test_one_that_is_late_shortens_steps_until_it_has_caught_up() -> None:
    paces = paces_of("a", "b")
    paces.begin(running(1), 1, 5.0)
    assert paces.limit_s([running(1), running(0, "b")], 5.06) == pytest.approx(PLANNED_S - 0.06)
    assert paces.limit_s([running(1)], 5.2) < 0
    assert paces.limit_s([running(4)], 5.2) == pytest.approx(PLANNED_S)


def test_it_counts_from_the_first_token_that_is_waited_for_here() -> None:
    paces = paces_of("a")
    paces.begin(running(20), 21, 5.0)  # claimed with a token that another worker drew
    paces.begin(running(21), 21, 6.0)
    assert paces.limit_s([running(20)], 5.0) == pytest.approx(PLANNED_S)
    assert paces.limit_s([running(21)], 5.05) == pytest.approx(PLANNED_S - 0.05)


def test_what_is_over_limits_nothing() -> None:
    paces = paces_of("a")
    paces.remove("a")
    paces.remove("a")
    assert paces.limit_s([running(0)], 0.0) == math.inf


@given(
    tokens=st.floats(0, 0.09),
    tokens_ms=st.floats(0.001, 10),
    late_s=st.floats(0, 1),
    num_outputs=st.integers(30, 200),
)
@settings(max_examples=300)
def test_whoever_was_late_meets_its_target_in_the_end(
    tokens: float, tokens_ms: float, late_s: float, num_outputs: int
) -> None:
    """A sequence whose steps alone are short enough, beside a prompt that takes all it may."""
    alone_s = min(tokens, 0.8 * PLANNED_S)
    paces, sequence, now = paces_of("a"), running(1), 5.0
    paces.begin(sequence, 1, now)
    now += late_s
    for _ in range(num_outputs - 1):
        limit_s = paces.limit_s([sequence], now)
        chunk = int(max(0.0, limit_s - alone_s) * 1000 / tokens_ms)
        step_s = alone_s + chunk * tokens_ms / 1000
        assert step_s <= max(alone_s, limit_s) + 1e-9
        now += step_s
        sequence.tokens.append(7)
    room_s = (num_outputs - 1) * (PLANNED_S - alone_s)
    if room_s >= late_s:
        assert now - 5.0 <= (num_outputs - 1) * PLANNED_S + 1e-6
