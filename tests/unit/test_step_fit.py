"""The fit of step times: found from few steps, followed when it changes, never absurd."""

from __future__ import annotations

import math
import random

import pytest

from common.engine.work import Work
from common.step_times import StepTimes, attended, mean
from common.worker.step_fit import StepFit, StepFits
from kvbaton.sampling import SamplingParams
from tests.unit.sequences import sequence_of

TRUTH = StepTimes(base_ms=5.0, token_ms=0.1, context_ms=0.0002)
EVEN = (1e-6, 1e-6, 1e-6)


def fitted(num_steps: int, seed: int, noise: float = 0.0, truth: StepTimes = TRUTH) -> StepFit:
    rng, fit = random.Random(seed), StepFit(0, EVEN)
    for _ in range(num_steps):
        num_tokens, start = rng.randint(1, 512), rng.randint(0, 4000)
        context = attended(num_tokens, start)
        fit.add(num_tokens, context, truth.step_s(num_tokens, context) * rng.uniform(1, 1 + noise))
    return fit


@pytest.mark.parametrize("seed", range(5))
def test_the_truth_is_found(seed: int) -> None:
    times = fitted(64, seed).times
    assert times is not None
    assert times.base_ms == pytest.approx(5.0, rel=0.05)
    assert times.token_ms == pytest.approx(0.1, rel=0.05)
    assert times.context_ms == pytest.approx(0.0002, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 64, 200])
def test_no_coefficient_is_negative_and_a_step_like_those_seen_is_predicted(
    seed: int, num_steps: int
) -> None:
    times = fitted(num_steps, seed, noise=0.5).times
    assert times is not None
    assert min(times.base_ms, times.token_ms, times.context_ms) >= 0
    if num_steps >= 8:
        context = attended(256, 2000)
        assert times.step_s(256, context) / TRUTH.step_s(256, context) == pytest.approx(
            1.25, rel=0.3
        )


def test_steps_that_are_all_alike_are_predicted_exactly() -> None:
    fit = StepFit(0, EVEN)
    for _ in range(40):
        fit.add(100, 5000.0, 0.02)
    assert fit.times is not None
    assert fit.times.step_s(100, 5000.0) == pytest.approx(0.02, rel=0.01)


def test_a_worker_that_slows_down_is_believed_and_one_stall_is_not() -> None:
    fit, context = fitted(100, 1), attended(100, 100)
    fit.add(100, context, 60.0)
    for _ in range(63):
        fit.add(100, context, TRUTH.step_s(100, context))
    assert fit.times is not None
    assert fit.times.step_s(100, context) < 2 * TRUTH.step_s(100, context)
    for _ in range(600):
        fit.add(100, context, 10 * TRUTH.step_s(100, context))
    assert fit.times.step_s(100, context) > 8 * TRUTH.step_s(100, context)


def test_prompts_and_tokens_are_fitted_apart() -> None:
    fits = StepFits(512)
    assert (fits.prompts, fits.tokens) == (None, None)
    assert fits.queued_s([sequence_of(10)]) == 0.0

    def work(num_tokens: int) -> Work:
        return Work([0] * 600, 600, 0, num_tokens, [], SamplingParams())

    fits.add([work(1), work(1)], 0.004)
    assert fits.queued_s([sequence_of(10)]) == 0.0
    fits.add([work(500), work(1)], 0.1)
    assert fits.tokens is not None
    assert fits.tokens.step_s(2, 2.0) == pytest.approx(0.004, rel=0.05)
    assert fits.queued_s([sequence_of(501)]) == pytest.approx(0.1, rel=0.05)
    assert fits.queued_s([sequence_of(501), sequence_of(501)]) == pytest.approx(0.2, rel=0.05)


def test_a_prompt_of_many_steps_pays_for_each() -> None:
    times = StepTimes(base_ms=10, token_ms=1, max_tokens=100)
    assert times.prompt_s(250, 0) == pytest.approx(0.28)
    assert times.prompt_s(0, 0) == 0.0
    assert [times.room_beside(count) for count in (250, 100, 1)] == [50, 0, 99]
    full = StepTimes(base_ms=10, token_ms=1, max_tokens=100, full_tokens=30)
    assert [full.room_beside(count) for count in (250, 100, 130, 129, 1)] == [0, 0, 0, 71, 99]
    assert StepTimes().room_beside(7) == 0
    assert mean([times, StepTimes(base_ms=20, token_ms=3)]) == StepTimes(
        base_ms=15, token_ms=2, max_tokens=100
    )


@pytest.mark.parametrize("base_ms", [0.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_chunks_come_to_fill_what_targets_leave_beside_running_sequences(
    base_ms: float, noise: float
) -> None:
    """Whatever part of a step's time is the same for each, and though all steps are alike."""
    fits, rng = StepFits(512), random.Random(1)

    def work(num_tokens: int) -> Work:
        return Work([0] * 600, 600, 500, num_tokens, [], SamplingParams())

    def room(within_s: float, num_running: int = 3) -> float:
        return fits.num_prompt_tokens(within_s, num_running=num_running, context=1503)

    def step(chunk: int) -> float:
        step_s = 0.03 + (base_ms + 2 * chunk) / 1000 * rng.uniform(1 - noise, 1 + noise)
        fits.add([work(1), work(chunk), work(1), work(1)], step_s)
        return step_s

    assert (room(math.inf), room(0.1)) == (math.inf, 0)
    for _ in range(16):
        fits.add([work(1)] * 3, 0.03)
    assert room(0.1) == 0  # what prompts take is not known yet
    longest_s = max(step(max(16, int(room(0.1)))) for _ in range(300))
    fitting = (70 - base_ms) / 2
    assert room(0.1) == pytest.approx(fitting, rel=0.05 + noise)
    assert longest_s < 0.1 * (1.02 + noise)
    assert room(0.1, num_running=0) > room(0.1)
    assert room(0.02) == room(-1.0) == 0


def test_a_chunk_of_a_whole_step_tells_what_a_token_takes() -> None:
    fits = StepFits(512)
    fits.add([Work([0] * 600, 600, 0, 500, [], SamplingParams())], 1.0)
    assert fits.paced_token_s == pytest.approx(0.002)
