"""The engine's numbers against transformers', over scattered blocks and uneven chunks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from common.engine.work import Work
from tests.unit.engine_models import (
    FAMILIES,
    GREEDY,
    NUM_BLOCKS,
    build,
    logits_of,
    make_engine,
    part,
    random_tokens,
    reference_greedy,
    reference_logits,
    whole,
)


@pytest.mark.parametrize("attention", ["native", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, attention: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    engine = make_engine(tmp_path, attention=attention)
    rng = random.Random(family)
    for length in (1, 15, 16, 17, 64, 65, 150):
        tokens = random_tokens(rng, length)
        slots = rng.sample(range(NUM_BLOCKS), -(-length // 16))
        cut = rng.randrange(length)
        if cut:
            engine.step_sync([part(tokens, slots, 0, cut)])
        logits = logits_of(engine, [whole(tokens, slots, cut)])
        expected = reference_logits(model, tokens)[-1]
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_equals_transformers(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    engine = make_engine(tmp_path)
    rng = random.Random(1)
    tokens = random_tokens(rng, 13)
    slots = rng.sample(range(NUM_BLOCKS), 5)
    expected = reference_greedy(model, tokens, 64)
    start = 0
    while len(tokens) < 13 + 64:
        (result,) = engine.step_sync([Work(tokens, 13, start, len(tokens) - start, slots, GREEDY)])
        assert result is not None
        start = len(tokens)
        tokens.append(result.token_id)
    assert tokens[13:] == expected
    engine.close()


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_a_mixed_step_serves_every_sequence(block_size: int, tmp_path: Path) -> None:
    """Prefill, a chunk in the middle, a chunk that samples nothing, and decodes, all at once."""
    model = build("mistral", tmp_path)
    engine = make_engine(tmp_path, block_size=block_size)
    rng = random.Random(2)
    lengths = (5, 40, 31, 18)
    computed = (0, 7, 30, 17)
    per_sequence = [-(-length // block_size) for length in lengths]
    arena = memoryview(bytearray(engine.info.layout.block_bytes * sum(per_sequence)))
    engine.attach(arena)
    free = rng.sample(range(sum(per_sequence)), sum(per_sequence))
    prompts = [random_tokens(rng, length) for length in lengths]
    slots = [[free.pop() for _ in range(count)] for count in per_sequence]
    for tokens, table, start in zip(prompts, slots, computed, strict=True):
        if start:
            engine.step_sync([part(tokens, table, 0, start)])
    works = [whole(*sequence) for sequence in zip(prompts, slots, computed, strict=True)]
    works.insert(1, part(prompts[1], slots[1], 3, 7))
    logits = logits_of(engine, works)
    for row, tokens in zip(logits, prompts, strict=True):
        expected = reference_logits(model, tokens)[-1]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    results = engine.step_sync(works)
    assert results[1] is None
    assert [result.token_id for result in results if result] == logits.argmax(-1).tolist()
    engine.close()


@pytest.mark.parametrize("attention", ["native", "torch"])
def test_bfloat16_is_close_to_transformers(attention: str, tmp_path: Path) -> None:
    model = build("qwen3", tmp_path, torch.bfloat16)
    engine = make_engine(tmp_path, attention=attention)
    assert engine.info.layout.dtype == "bfloat16"
    tokens = random_tokens(random.Random(3), 90)
    logits = logits_of(engine, [whole(tokens, range(6))])[0]
    expected = reference_logits(model, tokens)[-1]
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0)
    exact = reference_logits(model.float(), tokens)[-1]
    assert (logits - exact).abs().mean() < 2 * (expected - exact).abs().mean()
    engine.close()


def test_shards_give_the_same_logits(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "single")
    build("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    tokens = random_tokens(random.Random(4), 20)
    results = []
    for name in ("single", "sharded"):
        engine = make_engine(tmp_path / name)
        results.append(logits_of(engine, [whole(tokens, [3, 1])]))
        engine.close()
    assert torch.equal(*results)
    expected = reference_logits(model, tokens)[-1]
    torch.testing.assert_close(results[0][0], expected, atol=1e-4, rtol=0)


def test_a_float16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    build("llama", tmp_path, torch.float16)
    engine = make_engine(tmp_path)
    assert engine.info.layout.dtype == "float32"
    engine.close()
