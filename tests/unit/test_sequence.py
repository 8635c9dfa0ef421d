"""A sequence by value: what it has computed, which blocks are full, when it ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.mock import MOCK_LAYOUT
from common.engine.work import ModelInfo
from common.kv.hashing import prompt_keys
from common.messages import Granted
from common.worker.sequence import plan_chunks
from kvbaton.sampling import SamplingParams
from tests.unit.sequences import ROOT, sequence_of

INFO = ModelInfo(
    fingerprint="f", max_model_len=10, vocab_size=100, eos_token_ids=(2, 3), layout=MOCK_LAYOUT
)


def table_of(num_blocks: int, num_committed: int, keys: list[bytes]) -> Granted:
    return Granted(
        blocks=list(range(20, 20 + num_blocks)),
        num_committed=num_committed,
        num_keys=len(keys),
    )


# ---- the block table ----------------------------------------------------------------------------


def test_committed_blocks_count_as_computed() -> None:
    sequence = sequence_of(7)
    sequence.granted(table_of(4, 2, prompt_keys(ROOT, sequence.tokens, 2)))
    assert sequence.blocks == [20, 21, 22, 23]
    assert (sequence.num_computed, sequence.num_uncomputed) == (4, 3)


def test_the_last_token_is_never_taken_for_computed() -> None:
    sequence = sequence_of(4)
    sequence.granted(table_of(2, 2, prompt_keys(ROOT, sequence.tokens, 2)))
    assert (sequence.num_computed, sequence.num_uncomputed) == (3, 1)
    assert sequence.new_blocks() == (2, [], [])


def test_a_claimed_sequence_goes_on_after_the_first_token() -> None:
    sequence = sequence_of(3)
    sequence.claimed(77)
    assert sequence.tokens == [10, 11, 12, 77]
    assert (sequence.num_computed, sequence.num_uncomputed, sequence.num_outputs) == (3, 1, 1)


def test_work_samples_only_when_it_reaches_the_last_token() -> None:
    sequence = sequence_of(5)
    sequence.num_computed = 2
    work = sequence.work(2)
    assert (work.start, work.num_tokens, work.sample) == (2, 2, False)
    assert sequence.work(3).sample


def test_blocks_are_found_in_the_place_of_their_store() -> None:
    sequence = sequence_of(3, first_slot=100)
    sequence.granted(table_of(2, 0, []))
    sequence.grow(7)
    assert sequence.blocks == [20, 21, 7]
    assert sequence.work(3).slots == [120, 121, 107]


# ---- blocks that became full --------------------------------------------------------------------


def test_full_blocks_are_told_once_and_without_keys_that_are_known() -> None:
    sequence = sequence_of(5)
    sequence.granted(table_of(3, 0, prompt_keys(ROOT, sequence.tokens, 2)))
    sequence.num_computed = 3
    assert sequence.new_blocks() == (0, [20], [])
    assert sequence.new_blocks() == (1, [], [])
    sequence.num_computed = 5
    assert sequence.new_blocks() == (1, [21], [])


def test_blocks_past_the_known_keys_come_with_keys_of_their_own() -> None:
    sequence = sequence_of(3)
    sequence.granted(table_of(1, 0, prompt_keys(ROOT, sequence.tokens, 2)))
    sequence.blocks += [30, 31]
    sequence.tokens += [13, 14, 15]
    sequence.num_computed = 6
    keys = prompt_keys(ROOT, sequence.tokens, 2)
    assert sequence.new_blocks() == (0, [20], [])
    assert sequence.new_blocks() == (1, [30, 31], keys[1:])


@given(st.integers(1, 12), st.integers(0, 12), st.lists(st.integers(1, 4), max_size=8), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_however_it_is_computed_the_keys_are_those_of_all_tokens(
    num_prompt_tokens: int, num_outputs: int, chunks: list[int], data: st.DataObject
) -> None:
    sequence = sequence_of(num_prompt_tokens + num_outputs)
    keys = prompt_keys(ROOT, sequence.tokens, 2)
    known = keys[: data.draw(st.integers(0, len(keys)))]
    num_cached = data.draw(st.integers(0, min(len(known), (len(sequence.tokens) - 1) // 2)))
    sequence.granted(table_of(len(keys) + 1, num_cached, known))
    told = known[:num_cached]
    for chunk in [*chunks, 100]:
        sequence.num_computed = min(sequence.num_computed + chunk, len(sequence.tokens))
        while True:
            first, blocks, own = sequence.new_blocks()
            if not blocks:
                break
            assert first == len(told)
            assert blocks == sequence.blocks[first : first + len(blocks)]
            assert len(own) in (0, len(blocks))
            told += own or known[first : first + len(blocks)]
    assert told == keys
    assert sequence.num_committed == len(keys)


def test_digests_are_bound_to_keys_that_both_ends_know() -> None:
    sequence = sequence_of(5)
    first, second = prompt_keys(ROOT, sequence.tokens, 2)
    assert sequence.pieces(0, [20, 21, 22], []) == [
        (0, 20, first, True),
        (1, 21, second, True),
        (2, 22, second, False),
    ]
    sequence.tokens += [15]
    assert sequence.pieces(2, [22], [b"mine"]) == [(2, 22, b"mine", True)]
    assert sequence.digest_key(2) == second  # the store has not heard of the third
    sequence.granted(table_of(3, 3, prompt_keys(ROOT, sequence.tokens, 2)))
    assert sequence.digest_key(2) == prompt_keys(ROOT, sequence.tokens, 2)[2]
    assert sequence_of(1).pieces(0, [20], []) == [(0, 20, ROOT, False)]
    sequence.is_over = True  # its blocks may be another's
    assert not any(piece.is_own_key for piece in sequence.pieces(0, [20, 21, 22], []))


# ---- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "last_token", "reason"),
    [
        (SamplingParams(), 50, None),
        (SamplingParams(), 2, "stop"),
        (SamplingParams(), 3, "stop"),
        (SamplingParams(ignore_eos=True), 2, None),
        (SamplingParams(stop_token_ids=[50]), 50, "stop"),
        (SamplingParams(stop_token_ids=[2], ignore_eos=True), 2, "stop"),
        (SamplingParams(max_tokens=2), 50, "length"),
        (SamplingParams(max_tokens=3), 50, None),
        (SamplingParams(max_tokens=2), 2, "stop"),  # the more telling of two reasons
    ],
)
def test_a_sequence_ends_by_its_last_token_or_by_its_length(
    sampling: SamplingParams, last_token: int, reason: str | None
) -> None:
    sequence = sequence_of(3, sampling=sampling)
    sequence.tokens += [50, last_token]
    assert sequence.finish_reason(INFO) == reason


@pytest.mark.parametrize(("num_tokens", "reason"), [(9, None), (10, "length"), (11, "length")])
def test_a_sequence_ends_at_the_models_context(num_tokens: int, reason: str | None) -> None:
    assert sequence_of(num_tokens).finish_reason(INFO) == reason


# ---- chunks -------------------------------------------------------------------------------------


def test_a_prompt_joins_a_step_that_is_not_full_yet() -> None:
    waiting = [sequence_of(count) for count in (3, 4, 5, 20)]

    def counts(enough: float, budget: int = 16) -> list[int]:
        return [count for _, count in plan_chunks(waiting, budget, enough)]

    assert counts(3) == [3]
    assert counts(4) == [3, 4]
    assert counts(8) == [3, 4, 5]
    assert counts(13) == counts(math.inf) == [3, 4, 5, 4]
    assert counts(3, budget=2) == [2]


def chunks_of(num_tokens: list[int], budget: int) -> list[tuple[int, int]]:
    waiting = [sequence_of(count, arrived_at=index) for index, count in enumerate(num_tokens)]
    return [(waiting.index(sequence), count) for sequence, count in plan_chunks(waiting, budget)]


@pytest.mark.parametrize(
    ("num_tokens", "budget", "chunks"),
    [
        ([3, 4], 10, [(0, 3), (1, 4)]),
        ([3, 4], 7, [(0, 3), (1, 4)]),
        ([3, 4], 5, [(0, 3), (1, 2)]),
        ([3, 4], 3, [(0, 3)]),
        ([9, 4], 4, [(0, 4)]),
        ([9], 0, []),
        ([9], -2, []),
        ([], 5, []),
    ],
)
def test_a_budget_is_spent_in_the_order_of_the_line(
    num_tokens: list[int], budget: int, chunks: list[tuple[int, int]]
) -> None:
    assert chunks_of(num_tokens, budget) == chunks


@given(st.lists(st.integers(1, 20), max_size=6), st.integers(1, 30))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_budget_is_spent_whole_while_there_is_work(num_tokens: list[int], budget: int) -> None:
    chunks = chunks_of(num_tokens, budget)
    assert sum(count for _, count in chunks) == min(budget, sum(num_tokens))
    assert all(0 < count <= num_tokens[index] for index, count in chunks)
    assert all(count == num_tokens[index] for index, count in chunks[:-1])
