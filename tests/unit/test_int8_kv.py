"""KV kept as int8: how rows are rounded, and the engine that reads and writes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.engine.kv_cache import dequantised_rows, quantised_rows
from common.engine.runner import TorchEngine
from common.engine.work import Sampled, Work
from common.worker.config import WorkerConfig
from common.worker.main import make_engine as make_worker_engine
from kvbaton.sampling import SamplingParams
from tests.unit.engine_models import (
    NUM_BLOCKS,
    build,
    kv,
    logits_of,
    make_engine,
    part,
    random_tokens,
    sequence_kv,
    whole,
)
from tests.unit.test_engine_invariance import same_bits_in_any_company

SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, seed=11, logprobs=3)
LENGTH = 70


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_rounded_to_steps_of_its_own_scale(dtype: torch.dtype) -> None:
    magnitudes = torch.tensor([1e-30, 1e-3, 1.0, 1e4])
    numbers = (random_numbers(4, 65) * magnitudes[:, None]).to(dtype)
    rows = quantised_rows(numbers)
    assert rows.shape == (4, 69)
    largest = numbers.float().abs().amax(dim=1)
    error = (dequantised_rows(rows) - numbers.float()).abs().amax(dim=1)
    assert (error <= largest / 127 * 0.5001).all()
    assert (error > largest / 127 * 0.3).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama_odd", "mistral", "qwen3"])
def test_both_kinds_of_engine_compute_alike_and_near_the_exact_kv(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """A long chunk, one over what it left, and single tokens."""
    build(family, tmp_path, getattr(torch, dtype))
    tokens = random_tokens(random.Random(family), 120)

    def outcome(attention: str, kv_cache_dtype: str) -> Tensor:
        engine = make_engine(tmp_path, attention=attention, kv_cache_dtype=kv_cache_dtype)
        engine.step_sync([part(tokens, range(8), 0, 60)])
        engine.step_sync([part(tokens, range(8), 60, 118)])
        engine.step_sync([part(tokens, range(8), 118, 119)])
        logits = logits_of(engine, [whole(tokens, range(8), 119)])[0]
        engine.close()
        return logits

    native, torchs = (outcome(attention, "int8") for attention in ("native", "torch"))
    exact = outcome("native", "auto")
    # 1e-5 but for a few numbers between two steps, which either may round either way
    tolerance = 1e-3 if dtype == "float32" else 0.05
    torch.testing.assert_close(native, torchs, atol=tolerance, rtol=0)
    assert 1e-4 < (native - exact).abs().max() < 0.1
    if dtype == "float32":
        assert (native - torchs).abs().max() < 0.5 * (native - exact).abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["native", "torch"])
def test_bits_depend_on_the_request_alone(attention: str, dtype: str, tmp_path: Path) -> None:
    build("llama_odd", tmp_path, getattr(torch, dtype))
    engine = make_engine(tmp_path, batch_invariant=True, attention=attention, kv_cache_dtype="int8")
    assert same_bits_in_any_company(engine, random.Random(dtype), (1, 9))
    engine.close()


def continued(
    engine: TorchEngine, tokens: list[int], computed: int, slots: Sequence[int], length: int
) -> list[Sampled]:
    """Steps until there are `length` tokens, which are added to these."""
    results = []
    while len(tokens) < length:
        work = Work(tokens, 21, computed, len(tokens) - computed, slots, SAMPLING)
        (result,) = engine.step_sync([work])
        assert result is not None
        results.append(result)
        computed = len(tokens)
        tokens.append(result.token_id)
    return results


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_moved_or_recomputed_kv_gives_the_same_tokens(quantization: str, tmp_path: Path) -> None:
    """One worker computes alone; one goes on over blocks that were copied byte for byte, into
    other places, as movers, tiers and prefixes have them; one recomputes all and goes on."""
    build("qwen3", tmp_path, torch.bfloat16)
    alone, other = (
        make_engine(
            tmp_path, batch_invariant=True, quantization=quantization, kv_cache_dtype="int8"
        )
        for _ in range(2)
    )
    prompt = random_tokens(random.Random(10), 21)
    tokens = [*prompt]
    expected = continued(alone, tokens, 0, range(5), LENGTH)
    for moved in (21, 48, 69):
        slots = random.Random(moved).sample(range(NUM_BLOCKS), 5)
        kv(other)[slots] = kv(alone)[list(range(5))]
        results = continued(other, tokens[: moved + 1], moved, slots, LENGTH)
        assert results == expected[moved + 1 - 21 :]
        slots = [slot for slot in range(NUM_BLOCKS) if slot not in slots][:5]
        results = continued(other, tokens[:moved], 0, slots, LENGTH)
        assert results == expected[moved - 21 :]
        assert torch.equal(sequence_kv(other, slots, 69), sequence_kv(alone, range(5), 69))
    alone.close()
    other.close()


async def test_the_setting_of_a_worker_reaches_its_engine(tmp_path: Path) -> None:
    """Workers that keep KV in another way, or compute it so, are told apart."""
    build("llama", tmp_path)
    infos = []
    for kept, computed in (("auto", "auto"), ("int8", "auto"), ("int8", "bfloat16")):
        settings = WorkerConfig(model=str(tmp_path), kv_cache_dtype=kept, dtype=computed)
        engine = await make_worker_engine(settings)
        assert isinstance(engine, TorchEngine)
        infos.append(engine.info)
        engine.close()
    plain, int8, from_bfloat16 = infos
    assert (plain.layout.dtype, int8.layout.dtype) == ("float32", "int8")
    assert int8.layout == from_bfloat16.layout
    assert len({info.fingerprint for info in infos}) == 3
    assert int8.layout.block_bytes == 2 * 2 * 2 * 16 * (16 + 4)
    same = make_engine(tmp_path, attention="torch", kv_cache_dtype="int8")
    assert same.info.fingerprint == int8.fingerprint
    same.close()
