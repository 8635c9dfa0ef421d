"""What a worker's backlog means for a prompt that comes now."""

from __future__ import annotations

import pytest

from common.step_times import StepTimes, due_at
from services.gateway.routing.estimates import Backlog, resolved

TIMES = StepTimes(token_ms=1.0, max_tokens=100)


def ahead_s(backlog: Backlog, num_tokens: int, now: float) -> float:
    return backlog.ahead_s(TIMES, num_tokens, num_tokens / 1000, now)[0]


def test_what_is_due_before_counts_less_what_is_done_of_it() -> None:
    backlog = Backlog()
    assert ahead_s(backlog, 100, 5.0) == 0.0
    backlog.add("a", 100, 0, 5.0)
    backlog.add("b", 100, 0, 5.0)
    assert ahead_s(backlog, 100, 5.0) == pytest.approx(0.2)
    assert ahead_s(backlog, 100, 5.06) == pytest.approx(0.14)
    assert ahead_s(backlog, 100, 9.0) == pytest.approx(0.1)  # late, but not for ever
    backlog.remove("a", 9.0)
    backlog.remove("a", 9.5)
    assert ahead_s(backlog, 100, 9.0) == pytest.approx(0.1)
    assert len(backlog) == 1


def test_a_short_prompt_passes_a_long_one_after_its_running_step() -> None:
    backlog = Backlog()
    backlog.add("long", 10_000, 0, 0.0)
    assert ahead_s(backlog, 100, 0.0) == pytest.approx(0.05)
    # What its own step has room for is computed with it.
    assert ahead_s(backlog, 40, 0.0) == pytest.approx(0.05 + 0.06)
    # But not one that has waited for long.
    assert ahead_s(backlog, 100, 20.0) >= 0.0
    backlog.add("second", 10_000, 0, 0.0)
    assert ahead_s(backlog, 100, 21.0) == pytest.approx(10.0)


def test_nobody_is_passed_by_those_who_come_much_later() -> None:
    assert due_at(0.0, 10.0) < due_at(20.1, 0.0)
    assert due_at(0.0, 10.0) > due_at(0.0, 1.0)


def test_unknown_times_are_those_of_the_peers_or_a_guess() -> None:
    guess = StepTimes(base_ms=7.0)
    assert resolved(TIMES, [], guess) is TIMES
    assert resolved(None, [None, TIMES], guess) == TIMES
    assert resolved(None, [None], guess) is guess
