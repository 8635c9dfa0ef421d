"""Batch-invariant mode: a request's bits depend on that request alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.engine.config import ModelError
from common.engine.invariance import ROW_COUNTS, agreeing_row_counts, in_fixed_parts, tile_rows
from common.engine.linear import Linear
from common.engine.runner import TorchEngine
from common.engine.work import Work
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

LENGTH = 70
BLOCKS = 5


def outcome(engine: TorchEngine, tokens: list[int], slots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits after `tokens` from one undivided prefill alone, and the KV it left."""
    logits = logits_of(engine, [whole(tokens, slots)])[0]
    return logits, sequence_kv(engine, slots, len(tokens))


def company(rng: random.Random, slots: list[int], size: int) -> list[Work]:
    """Other sequences, prefilling or decoding over whatever KV their blocks hold."""
    works: list[Work] = []
    while len(works) < size:
        slot = rng.choice(slots)
        length = rng.randrange(1, 17)
        start = rng.choice([0, length - 1])
        works.append(whole(random_tokens(rng, length), [slot], start))
    return works


def among(rng: random.Random, work: Work, others: list[Work]) -> tuple[list[Work], int]:
    """`others` with `work` at a random place, and the index of its logits."""
    place = rng.randrange(len(others) + 1)
    return [*others[:place], work, *others[place:]], place


def same_bits_in_any_company(
    engine: TorchEngine, rng: random.Random, sizes: Sequence[int] = (1, 2, 7, 32)
) -> bool:
    """Whether a sequence, in random chunks among random others, gives the bits it gives alone."""
    kv(engine).fill_(0 if engine.info.layout.dtype == "int8" else 0.5)  # others read it as it is
    tokens = random_tokens(rng, LENGTH)
    logits, cached = outcome(engine, tokens, range(BLOCKS))
    for size in sizes:
        table = rng.sample(range(BLOCKS, NUM_BLOCKS), BLOCKS)
        free = [slot for slot in range(BLOCKS, NUM_BLOCKS) if slot not in table]
        done = 0
        while done < LENGTH - 1:  # single decode steps among larger chunks
            stop = min(LENGTH - 1, done + rng.choice([1, 1, 2, 5, 16, 23, 40]))
            works, _ = among(rng, part(tokens, table, done, stop), company(rng, free, size))
            engine.step_sync(works)
            done = stop
        works, place = among(rng, whole(tokens, table, done), company(rng, free, size))
        same = torch.equal(logits_of(engine, works)[place], logits)
        if not same or not torch.equal(sequence_kv(engine, table, LENGTH), cached):
            return False
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("attention", ["native", "torch"])
@pytest.mark.parametrize("family", ["llama_odd", "mistral", "qwen3"])
def test_bits_depend_on_the_request_alone(
    family: str, attention: str, threads: int, dtype: str, tmp_path: Path
) -> None:
    build(family, tmp_path, getattr(torch, dtype))
    engine = make_engine(tmp_path, batch_invariant=True, attention=attention, threads=threads)
    # Threads that wait for each other are slow where cores are shared with other processes.
    sizes = (1, 2, 7, 32) if threads == 1 else (9,)
    assert same_bits_in_any_company(engine, random.Random(f"{family} {attention} {dtype}"), sizes)
    engine.close()


def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    build("llama", tmp_path, torch.bfloat16)
    tokens = random_tokens(random.Random(6), 200)
    results = []
    for threads in (1, 2):
        engine = make_engine(tmp_path, batch_invariant=True, threads=threads)
        results.append(outcome(engine, tokens, range(13)))
        engine.close()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["native", "torch"])
def test_a_recomputed_sequence_goes_on_with_the_same_bits(
    attention: str, dtype: str, tmp_path: Path
) -> None:
    """One worker decodes token by token; another recomputes it all from the tokens and goes on."""
    build("qwen3", tmp_path, getattr(torch, dtype))
    engine = make_engine(tmp_path, batch_invariant=True, attention=attention)
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=11, logprobs=3)
    tokens = random_tokens(random.Random(10), 21)
    computed = 0
    results = []
    while len(tokens) < LENGTH:
        work = Work(tokens, 21, computed, len(tokens) - computed, range(BLOCKS), sampling)
        (result,) = engine.step_sync([work])
        assert result is not None
        results.append(result)
        computed = len(tokens)
        tokens.append(result.token_id)
    for length in (40, 64, 69):
        other = range(BLOCKS, 2 * BLOCKS)
        again = engine.step_sync([Work(tokens[:length], 21, 0, length, other, sampling)])
        assert again == [results[length - 21]]
        assert torch.equal(
            sequence_kv(engine, other, length), sequence_kv(engine, range(BLOCKS), length)
        )
    engine.close()


@pytest.mark.parametrize("invariant", [False, True])
def test_kernels_that_differ_by_shape_are_seen_and_avoided(
    invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products whose bits depend on the number of rows: only invariant mode still holds."""
    honest = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, x: honest(self, x) * (1 + len(x) * 1e-5))
    build("llama", tmp_path)
    engine = make_engine(tmp_path, batch_invariant=invariant, attention="torch")
    assert same_bits_in_any_company(engine, random.Random(7)) is invariant
    engine.close()


def test_attention_that_differs_by_chunk_is_seen(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = make_engine(tmp_path, attention="torch")
    assert not same_bits_in_any_company(engine, random.Random(8))
    engine.close()


def test_default_mode_is_close_to_invariant_mode(tmp_path: Path) -> None:
    build("llama", tmp_path)
    tokens = random_tokens(random.Random(5), LENGTH)
    results = []
    for invariant in (False, True):
        engine = make_engine(tmp_path, batch_invariant=invariant)
        results.append(outcome(engine, tokens, range(BLOCKS))[0])
        engine.close()
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_row_counts_that_disagree_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Linear.__call__

    def by_shape(self: Linear, x: Tensor) -> Tensor:
        return honest(self, x) + (1e-3 if len(x) in (4, 64) else 0.0)

    monkeypatch.setattr(Linear, "__call__", by_shape)
    counts = agreeing_row_counts([Linear(torch.randn(64, 96))])
    assert 4 not in counts
    assert 64 not in counts
    assert 16 in counts


def test_kernels_that_differ_by_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Linear.__call__
    monkeypatch.setattr(
        Linear, "__call__", lambda self, x: honest(self, x) + torch.get_num_threads()
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(ModelError, match="use threads 1"):
        agreeing_row_counts([Linear(torch.randn(64, 96))])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [1, 31, 99, 100, 704])
def test_an_exponential_does_not_depend_on_its_place(inner: int, dtype: torch.dtype) -> None:
    x = (torch.randn(256, inner, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    expected = in_fixed_parts(Tensor.exp_, x.clone())
    for first, last in ((0, 1), (3, 8), (255, 256), (17, 250)):
        assert torch.equal(in_fixed_parts(Tensor.exp_, x[first:last].clone()), expected[first:last])
    torch.testing.assert_close(expected.double(), x.double().exp(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 33, 255, 256, 257, 600, 1024])
def test_tiles_cover_the_rows_with_little_padding(count: int) -> None:
    tiles = tile_rows(count, ROW_COUNTS)
    assert set(tiles) <= set(ROW_COUNTS)
    assert count <= sum(tiles) < max(count * 1.5, 4) + 1
