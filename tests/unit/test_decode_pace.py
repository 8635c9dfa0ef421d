"""How long steps may take that keep running sequences waiting: by value, and that all keep up."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.step_times import PACED_SHARE
from common.worker.sequence import Sequence
from services.decode.pace import Paces, least_prompt_tokens
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


def prompt(num_tokens: int, first_due_at: float) -> Sequence:
    return sequence_of(num_tokens, first_due_at=first_due_at)


@pytest.mark.parametrize(
    ("prompts", "least"),
    [
        ([prompt(100, 60.0)], 2),  # 100 of the 500 steps that there are suffice for it
        ([prompt(100, 14.0)], 3),  # of 40 steps each has to compute 2.5
        ([prompt(100, 14.0), prompt(60, 14.0)], 4),
        ([prompt(100, 14.0), prompt(100, 60.0)], 3),
        ([prompt(100, 10.5)], 16),  # it is late with 16, too
        ([prompt(100, 9.0)], 16),
        ([prompt(100, 60.0), prompt(1, 0.0)], 16),  # no target
        ([], 2),
    ],
)
def test_prompts_get_what_they_need_to_be_in_time_and_no_more(
    prompts: list[Sequence], least: int
) -> None:
    assert least_prompt_tokens(prompts, 0.1, 10.0, most=16) == least


def test_of_tiny_blocks_prompts_get_one() -> None:
    assert least_prompt_tokens([prompt(100, 60.0)], 0.1, 10.0, most=1) == 1


@given(
    prompts=st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 30)), min_size=1, max_size=5),
    most=st.integers(1, 64),
)
def test_prompts_that_can_be_in_time_are(prompts: list[tuple[int, float]], most: int) -> None:
    """Whatever is due first is computed first, by steps that never compute more than `most`."""
    line = [
        prompt(num_tokens, due) for num_tokens, due in sorted(prompts, key=lambda each: each[1])
    ]
    before = 0
    for each in line:  # what even the largest steps would bring late
        before += each.num_uncomputed
        assume(math.ceil(before / most) * 0.1 <= each.first_due_at)
    now = 0.0
    while line:
        left = least_prompt_tokens(line, 0.1, now, most=most)
        assert left <= most
        now += 0.1
        while line and left:
            count = min(left, line[0].num_uncomputed)
            line[0].num_computed += count
            left -= count
            if not line[0].num_uncomputed:
                assert now <= line.pop(0).first_due_at + 0.1 + 1e-9
