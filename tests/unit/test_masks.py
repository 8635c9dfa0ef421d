"""What a request forbids is never drawn: allowed tokens, bad words, early ends, and biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.masks import Float32Array
from common.engine.sampler import sample
from common.engine.work import Sampled, Work
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams

EOS = (0,)
LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], dtype=np.float32))


def work_of(output: list[int], prompt: list[int] | None = None, **params: object) -> Work:
    prompt = prompt or [1]
    tokens = [*prompt, *output]
    return Work(
        tokens=tokens,
        num_prompt_tokens=len(prompt),
        start=len(tokens) - 1,
        num_tokens=1,
        slots=[0],
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
    )


def greedy(output: list[int], logits: Float32Array = LOGITS, **options: Any) -> int:
    work = work_of(output, temperature=0, **options)
    (result,) = sample(logits[None], [work], EOS)
    assert result is not None, work.error
    return result.token_id


def test_only_allowed_tokens_are_drawn_and_unknown_ids_count_for_nothing() -> None:
    assert greedy([]) == 1
    assert greedy([], allowed_token_ids=[2, 4, 99, -1]) == 4


def test_a_bad_words_last_token_is_forbidden_where_the_output_ends_with_the_others() -> None:
    assert greedy([], bad_words=[[1]]) == 3
    assert greedy([2], bad_words=[[2, 1], [2, 3], [4, 4]]) == 4
    assert greedy([3], bad_words=[[2, 1]]) == 1
    assert greedy([4, 2], bad_words=[[4, 2, 1]]) == 3
    assert greedy([2], bad_words=[[4, 2, 1]]) == 1
    assert greedy([], bad_words=[[99]]) == 1


def test_a_bad_word_is_not_looked_for_in_the_prompt() -> None:
    assert greedy([], prompt=[1, 2], bad_words=[[2, 1]]) == 1
    assert greedy([3], prompt=[1, 2], bad_words=[[2, 3, 1]]) == 1


def test_a_bias_is_added_after_the_masks() -> None:
    assert greedy([], logit_bias={2: 5.0, 77: 100.0}) == 2
    assert greedy([], logit_bias={1: -1.0}) == 3
    assert greedy([], logit_bias={2: 100.0}, allowed_token_ids=[3, 4]) == 3
    assert greedy([], logit_bias={0: 100.0}, min_tokens=1) == 1


def test_a_bias_is_penalised_with_the_logit() -> None:
    """vLLM adds it before the penalties: of a logit above zero half is left."""
    logits = np.array([0.0, 2.0, 3.0], dtype=np.float32)
    for bias, expected in ((2.0, 2), (0.5, 1)):  # 5 / 2 and 3.5 / 2, beside 2.0
        token = greedy([2], logits, prompt=[0], logit_bias={2: bias}, repetition_penalty=2.0)
        assert token == expected


def test_log_probabilities_stay_those_of_the_raw_distribution() -> None:
    work = work_of([], temperature=0, logprobs=1, allowed_token_ids=[4], logit_bias={4: 50.0})
    (result,) = sample(LOGITS[None], [work], EOS)
    assert isinstance(result, Sampled)
    assert (result.token_id, result.top_logprobs[0][0]) == (4, 1)
    assert result.logprob == pytest.approx(np.log(0.15), abs=1e-6)


def test_min_tokens_gives_way_where_nothing_but_an_end_is_left() -> None:
    assert greedy([], min_tokens=2, allowed_token_ids=[0]) == 0
    assert greedy([], min_tokens=2, allowed_token_ids=[0, 2]) == 2


def test_who_leaves_no_token_fails_alone() -> None:
    hopeless = work_of([], temperature=0, allowed_token_ids=[2, 99], bad_words=[[2]])
    other = work_of([], temperature=0)
    results = sample(np.stack([LOGITS, LOGITS]), [hopeless, other], EOS)
    assert results == [None, Sampled(1, 0.0)]
    assert isinstance(hopeless.error, InvalidRequestError)
    assert "leave none" in hopeless.error.message
    assert other.error is None


TOKENS = st.integers(0, 19)
FORBIDDING = st.fixed_dictionaries(
    {
        "allowed_token_ids": st.lists(st.integers(0, 25), max_size=6),
        "bad_words": st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=6),
        "min_tokens": st.integers(0, 8),
    }
)
OTHERS = st.fixed_dictionaries(
    {
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, -2.0, 100.0]), max_size=4),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 3.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 3]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "seed": st.integers(0, 2**32),
    }
)


@settings(max_examples=150, deadline=None)
@given(output=st.lists(TOKENS, max_size=6), forbidding=FORBIDDING, others=OTHERS)
def test_a_forbidden_token_never_comes_out(
    output: list[int], forbidding: dict[str, Any], others: dict[str, Any]
) -> None:
    logits = np.random.default_rng(others["seed"]).normal(size=20).astype(np.float32) * 4
    words = forbidding["bad_words"]
    forbidden = {word[-1] for word in words if [*output, word[-1]][-len(word) :] == word}
    left = {token for token in (forbidding["allowed_token_ids"] or range(20)) if token < 20}
    left -= forbidden
    work = work_of(output, **forbidding, **others)
    (result,) = sample(logits[None], [work], EOS)
    if not left:
        assert result is None
        assert work.error is not None
        return
    assert result is not None
    assert result.token_id in left
    if len(output) < forbidding["min_tokens"] and left != set(EOS):
        assert result.token_id not in EOS
