"""The mock engine by value: its token tells whether every block it read was the right one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.mock import (
    MOCK_LAYOUT,
    MOCK_VOCAB_SIZE,
    MockEngine,
    mock_output,
    mock_token,
)
from common.engine.work import Work
from common.step_times import StepTimes
from kvbaton.sampling import SamplingParams

BLOCK_SIZE = MOCK_LAYOUT.block_size
BLOCK_BYTES = MOCK_LAYOUT.block_bytes
PROMPT = list(range(100, 140))  # two full blocks and a half


def engine_of(num_blocks: int = 8) -> tuple[MockEngine, memoryview]:
    engine = MockEngine(step_s=0, token_s=0)
    arena = memoryview(bytearray(num_blocks * BLOCK_BYTES))
    engine.attach(arena)
    return engine, arena


def work_of(tokens: list[int], start: int, num_tokens: int, slots: list[int]) -> Work:
    return Work(
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        start=start,
        num_tokens=num_tokens,
        slots=slots,
        sampling=SamplingParams(),
        sample=start + num_tokens == len(tokens),
    )


async def token_after(engine: MockEngine, tokens: list[int], start: int, slots: list[int]) -> int:
    """The token that a step from `start` on draws."""
    [sampled] = await engine.step([work_of(tokens, start, len(tokens) - start, slots)])
    assert sampled is not None
    return sampled.token_id


def block(arena: memoryview, slot: int) -> memoryview:
    return arena[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]


async def test_a_prompt_computed_at_once_gives_its_token() -> None:
    engine, _ = engine_of()
    assert await token_after(engine, PROMPT, 0, [3, 1, 6]) == mock_token(PROMPT)


async def test_a_step_that_does_not_reach_the_end_draws_nothing() -> None:
    engine, _ = engine_of()
    assert await engine.step([work_of(PROMPT, 0, 39, [3, 1, 6])]) == [None]
    assert await token_after(engine, PROMPT, 39, [3, 1, 6]) == mock_token(PROMPT)


async def test_several_works_share_a_step() -> None:
    engine, _ = engine_of()
    works = [work_of(PROMPT, 0, 40, [0, 1, 2]), work_of(PROMPT[:20], 0, 20, [3, 4])]
    results = await engine.step(works)
    assert [result and result.token_id for result in results] == [
        mock_token(PROMPT),
        mock_token(PROMPT[:20]),
    ]


@given(st.lists(st.integers(0, MOCK_VOCAB_SIZE - 1), min_size=1, max_size=70), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_chunks_of_any_size_in_any_blocks_give_the_same_token(
    tokens: list[int], data: st.DataObject
) -> None:
    engine, _ = engine_of()
    slots = data.draw(st.permutations(range(8)))
    cuts = data.draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else set()

    async def main() -> int:
        start = 0
        for end in sorted(cuts):
            await engine.step([work_of(tokens, start, end - start, slots)])
            start = end
        return await token_after(engine, tokens, start, slots)

    assert asyncio.run(main()) == mock_token(tokens)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arena: block(arena, 1).__setitem__(slice(None), bytes(BLOCK_BYTES)),  # missing
        lambda arena: block(arena, 1).__setitem__(slice(None), bytes(block(arena, 0))),  # wrong
        lambda arena: block(arena, 1).__setitem__(5, block(arena, 1)[5] ^ 1),  # one bit
        lambda arena: block(arena, 2).__setitem__(5, block(arena, 2)[5] ^ 1),  # in the last block
    ],
)
async def test_a_block_that_is_not_right_shows_in_the_token(
    spoil: Callable[[memoryview], None],
) -> None:
    engine, arena = engine_of()
    await engine.step([work_of(PROMPT, 0, 39, [0, 1, 2])])
    spoil(arena)
    assert await token_after(engine, PROMPT, 39, [0, 1, 2]) != mock_token(PROMPT)


async def test_a_block_of_an_earlier_prompt_shows_in_the_token() -> None:
    engine, _ = engine_of()
    await token_after(engine, [9] * 40, 0, [0, 1, 2])
    assert await token_after(engine, PROMPT, 16, [0, 1, 2]) != mock_token(PROMPT)


@pytest.mark.parametrize("slots", [[0, 1, 3], [0, 0, 2], [3, 1, 2], [1, 0, 2]])
async def test_a_block_table_that_is_not_right_shows_in_the_token(slots: list[int]) -> None:
    engine, _ = engine_of()
    await engine.step([work_of(PROMPT, 0, 39, [0, 1, 2])])
    assert await token_after(engine, PROMPT, 39, slots) != mock_token(PROMPT)


async def test_a_copy_of_a_block_is_as_good_as_the_block() -> None:
    engine, arena = engine_of()
    await engine.step([work_of(PROMPT, 0, 39, [0, 1, 2])])
    for old, new in ((0, 5), (1, 6), (2, 7)):
        block(arena, new)[:] = block(arena, old)
    assert await token_after(engine, PROMPT, 39, [5, 6, 7]) == mock_token(PROMPT)


async def test_positions_past_the_length_do_not_count() -> None:
    engine, arena = engine_of()
    np.frombuffer(arena, dtype=np.uint8)[:] = 255
    assert await token_after(engine, PROMPT[:20], 0, [0, 1]) == mock_token(PROMPT[:20])


def test_the_output_is_the_chain_of_tokens_none_of_them_special() -> None:
    output = mock_output(PROMPT, 50)
    assert output[0] == mock_token(PROMPT)
    assert output[7] == mock_token(PROMPT + output[:7])
    assert all(5 <= token < MOCK_VOCAB_SIZE for token in output)
    assert mock_output(PROMPT, 3) == [output[0], output[1], output[2]]


def test_the_tokens_are_those_that_they_have_always_been() -> None:
    assert mock_output([5, 6, 7], 4) == [1124, 467, 813, 121]


@pytest.mark.parametrize(
    ("step_s", "token_s", "full"),
    [(0.01, 0.001, 80), (0.01, 0.0, 2**31 - 1), (1, 1e-12, 2**31 - 1)],
)
def test_how_many_tokens_fill_a_step_can_be_told(step_s: float, token_s: float, full: int) -> None:
    engine = MockEngine(step_s, token_s)
    assert engine.full_step_tokens == full
    times = StepTimes(full_tokens=engine.full_step_tokens)
    assert msgspec.convert(msgspec.to_builtins(times), StepTimes) == times
