"""The sampler by value: filters, penalties, log-probabilities, and noise without state."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.masks import Float32Array
from common.engine.sampler import (
    NumericalError,
    _adjust,
    _draw,
    probabilities,
    sample,
    uniform,
)
from common.engine.work import Sampled, Work
from kvbaton.sampling import SamplingParams

EOS = (0,)


def logits_from(values: list[float]) -> Float32Array:
    return np.log(np.array(values, dtype=np.float32))


def draw(
    logits: Float32Array,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    choice: int = 0,
    **params: object,
) -> Sampled:
    tokens = [*(prompt or [1]), *(output or [])]
    work = Work(
        tokens=tokens,
        num_prompt_tokens=len(prompt or [1]),
        start=len(tokens) - 1,
        num_tokens=1,
        slots=[0],
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        choice=choice,
    )
    (result,) = sample(logits[None], [work], EOS)
    assert result is not None
    return result


def kept(logits: Float32Array, **params: object) -> list[int]:
    weights = probabilities(logits, SamplingParams(**params))  # type: ignore[arg-type]
    return np.flatnonzero(weights).tolist()


DISTRIBUTION = logits_from([0.1, 0.4, 0.05, 0.3, 0.15])


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert draw(DISTRIBUTION, temperature=0) == Sampled(1, 0.0)
    assert draw(np.array([1, 3, 3, 2], dtype=np.float32), temperature=0).token_id == 1


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        # top_p counts within what top_k left: 0.4 / 0.7 is enough for 0.55
        ({"top_k": 2, "top_p": 0.55}, [1]),
        # a high temperature evens the distribution out
        ({"top_p": 0.5, "temperature": 100.0}, [1, 3, 4]),
    ],
)
def test_filters_keep_the_right_set(params: dict[str, float], expected: list[int]) -> None:
    assert kept(DISTRIBUTION, **params) == expected


def test_ties_at_a_boundary_all_stay() -> None:
    even = logits_from([0.2, 0.2, 0.2, 0.2, 0.2])
    assert kept(even, top_k=1) == [0, 1, 2, 3, 4]


def test_temperature_scales_the_logits() -> None:
    weights = probabilities(DISTRIBUTION, SamplingParams(temperature=0.5))
    expected = np.exp(DISTRIBUTION * 2)
    np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), rtol=1e-5)


def test_penalties_follow_their_definitions() -> None:
    logits = np.array([2.0, -1.0, 3.0, 0.5, 1.0], dtype=np.float32)

    def best(**params: float) -> tuple[int, Float32Array]:
        greedy = SamplingParams(temperature=0)
        work = Work([2, 1, 2, 2, 4], 2, 4, 1, [0], msgspec.structs.replace(greedy, **params))
        adjusted = _adjust(logits.copy(), work, EOS)
        (drawn,) = sample(logits[None], [work], EOS)
        assert drawn is not None
        return drawn.token_id, adjusted

    # repetition: prompt [2, 1] and output [2, 2, 4]; above zero divided, below multiplied
    token, adjusted = best(repetition_penalty=2.0)
    np.testing.assert_allclose(adjusted, [2.0, -2.0, 1.5, 0.5, 0.5])
    assert token == 0
    # frequency and presence: output alone
    token, adjusted = best(frequency_penalty=0.75)
    np.testing.assert_allclose(adjusted, [2.0, -1.0, 1.5, 0.5, 0.25])
    assert token == 0
    token, adjusted = best(presence_penalty=-1.0)
    np.testing.assert_allclose(adjusted, [2.0, -1.0, 4.0, 0.5, 2.0])
    assert token == 2


def test_min_tokens_masks_every_end_until_reached() -> None:
    logits = logits_from([0.5, 0.3, 0.15, 0.05])

    def after(output: list[int]) -> int:
        ends = [1, 4000]
        return draw(
            logits, output=output, stop_token_ids=ends, min_tokens=2, temperature=0
        ).token_id

    assert [after([]), after([3]), after([3, 3])] == [2, 2, 0]
    assert draw(logits, temperature=0, ignore_eos=True).token_id == 0


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**40))
def test_noise_is_a_pure_function_in_the_unit_interval(
    seed: int, choice: int, position: int
) -> None:
    value = uniform(seed, choice, position)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, choice, position)
    assert value != uniform(seed, choice, position + 1)
    assert value != uniform(seed, choice + 1, position)
    assert value != uniform(seed + 1, choice, position)


def test_noise_never_changes_between_versions() -> None:
    """Clients may hold us to a seed: these are part of the interface."""
    assert uniform(0, 0, 1) == 0.6269999134633438
    assert uniform(-1, 2, 3) == uniform(2**64 - 1, 2, 3)


def test_no_seed_counts_as_zero() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    assert draw(logits) == draw(logits, seed=0)
    assert draw(logits, seed=1) != draw(logits, seed=0)
    assert draw(logits, choice=1, seed=0) != draw(logits, seed=0)


def test_frequencies_follow_the_distribution() -> None:
    """Pearson's chi-square with 4 degrees of freedom; 18.47 is the 0.1 percent point."""
    draws = 4000
    counts = np.zeros(5)
    for seed in range(draws):
        counts[draw(DISTRIBUTION, seed=seed).token_id] += 1
    expected = np.exp(DISTRIBUTION) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 18.47


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    for seed in range(200):
        noise = uniform(seed, 0, 1)
        expected = int(np.searchsorted(np.cumsum([0.1, 0.4, 0.05, 0.3, 0.15]), noise, "right"))
        assert draw(DISTRIBUTION, seed=seed).token_id == expected


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True), st.integers(0, 100))
def test_a_draw_falls_where_the_running_sum_passes_the_noise(
    size: int, noise: float, seed: int
) -> None:
    weights = np.random.default_rng(seed).random(size, dtype=np.float32)
    weights[weights < 0.6] = 0
    weights[seed % size] = 1
    token = _draw(weights, noise)
    mass = np.cumsum(weights, dtype=np.float64)
    assert weights[token] > 0
    assert mass[token] - weights[token] <= noise * mass[-1] + 1e-9
    assert mass[token] >= noise * mass[-1] - 1e-9


@pytest.mark.parametrize("size", [255, 256, 257, 513])
def test_noise_at_the_very_end_draws_the_last_token_with_weight(size: int) -> None:
    weights = np.full(size, 0.1, dtype=np.float32)
    weights[-3:] = 0
    assert _draw(weights, 1.0) == size - 4
    assert _draw(weights, 0.0) == 0


def test_a_vanishing_temperature_is_greedy() -> None:
    for temperature in (1e-300, 1e-40, 1e-6, 1.1e-5):
        assert draw(DISTRIBUTION, temperature=temperature, seed=3).token_id == 1


def test_logprobs_are_of_the_raw_distribution() -> None:
    result = draw(DISTRIBUTION, temperature=0, logprobs=3, repetition_penalty=50.0, prompt=[1])
    assert result.token_id == 3  # the logits are below zero: that of 1 is multiplied by 50
    assert result.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert result.top_logprobs[0][0] == 1
    result = draw(DISTRIBUTION, temperature=0.1, top_k=1, logprobs=3)
    assert result.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in result.top_logprobs] == [1, 3, 4]
    for (_, logprob), probability in zip(result.top_logprobs, (0.4, 0.3, 0.15), strict=True):
        assert logprob == pytest.approx(math.log(probability), abs=1e-6)
    assert draw(DISTRIBUTION, logprobs=0, temperature=0).top_logprobs == ()
    assert len(draw(DISTRIBUTION, logprobs=20, temperature=0).top_logprobs) == 5


def test_tied_alternatives_come_in_order_of_id() -> None:
    even = np.zeros(9, dtype=np.float32)
    ranked = draw(even, logprobs=4, temperature=0).top_logprobs
    assert [token for token, _ in ranked] == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = DISTRIBUTION.copy()
    logits[2] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericalError, match="not finite"):
            draw(logits, temperature=temperature)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_does_not_see_its_neighbours(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits = generator.normal(size=(rows, 300)).astype(np.float32) * 3
    works = [
        Work(
            tokens=generator.integers(0, 300, 9).tolist(),
            num_prompt_tokens=4,
            start=8,
            num_tokens=1,
            slots=[0],
            sampling=SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
                top_p=data.draw(st.sampled_from([0.3, 0.9, 1.0])),
                top_k=data.draw(st.sampled_from([0, 5])),
                min_p=data.draw(st.sampled_from([0.0, 0.05])),
                frequency_penalty=data.draw(st.sampled_from([0.0, 0.5])),
                logprobs=data.draw(st.sampled_from([None, 2])),
                seed=row,
            ),
        )
        for row in range(rows)
    ]
    together = sample(logits, works, EOS)
    alone = [sample(logits[row : row + 1], [works[row]], EOS)[0] for row in range(rows)]
    assert together == alone
