"""Attention backends against one dense reference, and the kernel's way onto the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.engine.attention import make_backend, make_layers
from common.engine.attention.base import AttentionShape, Batch
from common.engine.attention.native import NativeAttention
from common.engine.config import ModelError
from common.engine.kv_cache import TORCH_DTYPES, KvCache
from common.engine.native import library
from common.kv.layout import KvLayout
from tests.unit.engine_models import fill_with_nan


def make_cache(shape: AttentionShape, dtype: str, num_blocks: int) -> KvCache:
    layout = KvLayout(
        num_layers=len(shape.windows),
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        dtype=dtype,
    )
    return KvCache(layout, memoryview(bytearray(layout.block_bytes * num_blocks)))


def make_batch(
    generator: np.random.Generator, shape: AttentionShape, sequences: list[tuple[int, int]]
) -> tuple[Batch, int]:
    """Sequences of (start, rows) over blocks in random order; also how many blocks there are."""
    starts = np.array([start for start, _ in sequences], dtype=np.int32)
    rows = np.array([count for _, count in sequences], dtype=np.int32)
    used = -(-(starts + rows) // shape.block_size)
    blocks = generator.permutation(int(used.sum())) + 1  # block 0, which padding names, is nobody's
    tables = np.zeros((len(sequences), int(used.max())), dtype=np.int32)
    for row, end, count in zip(tables, np.cumsum(used), used, strict=True):
        row[:count] = blocks[end - count : end]
    row_starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
    return Batch(row_starts, starts, tables), int(used.sum()) + 1


def fill(cache: KvCache, batch: Batch, generator: np.random.Generator) -> None:
    """Random KV where sequences have positions, NaN everywhere else."""
    fill_with_nan(cache.blocks)
    layout = cache.layout
    for table, length in zip(batch.tables, batch.lengths(), strict=True):
        positions = torch.arange(length)
        slots = torch.from_numpy(table)[positions // layout.block_size].long()
        for layer in range(layout.num_layers):
            numbers = generator.normal(size=(length, 2, layout.num_kv_heads, layout.head_dim))
            rows = torch.from_numpy(numbers).to(TORCH_DTYPES.get(layout.dtype, torch.float32))
            cache.write(layer, rows, slots, positions % layout.block_size)


def dense(
    shape: AttentionShape, layer: int, batch: Batch, queries: Tensor, cache: KvCache
) -> Tensor:
    """Attention by its definition, in float64."""
    size, groups = shape.block_size, shape.num_heads // shape.num_kv_heads
    window = shape.windows[layer] or 1 << 30
    results = []
    for index, (table, length) in enumerate(zip(batch.tables, batch.lengths(), strict=True)):
        pages = cache.read(layer, torch.from_numpy(table[: -(-length // size)]).long()).double()
        keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        for row in range(batch.row_starts[index], batch.row_starts[index + 1]):
            position = int(batch.starts[index]) + row - int(batch.row_starts[index])
            seen = slice(max(0, position - window + 1), position + 1)
            for head in range(shape.num_heads):
                scores = keys[head // groups, seen] @ queries[row, head].double() * shape.scale
                results.append(scores.softmax(0) @ values[head // groups, seen])
    return torch.stack(results).view(-1, shape.num_heads, shape.head_dim)


def check(
    name: str,
    shape: AttentionShape,
    sequences: list[tuple[int, int]],
    dtype: str = "float32",
    fixed_order: bool = False,
    *,
    int8_kv: bool = False,
) -> None:
    generator = np.random.default_rng(0)
    batch, num_blocks = make_batch(generator, shape, sequences)
    cache = make_cache(shape, "int8" if int8_kv else dtype, num_blocks)
    fill(cache, batch, generator)
    rows = int(batch.row_starts[-1])
    # Queries are a part of wider rows, as the model's are, and one row of padding follows.
    wide = torch.from_numpy(generator.normal(size=(rows + 1, shape.num_heads + 2, shape.head_dim)))
    queries = wide.to(TORCH_DTYPES[dtype])[:, : shape.num_heads]
    out = torch.full((rows + 1, shape.num_heads, shape.head_dim), 7.0, dtype=queries.dtype)
    backend = make_backend(name, shape, fixed_order=fixed_order)
    backend.plan(batch)
    for layer in range(len(shape.windows)):
        backend.attend(layer, queries, cache, out)
        expected = dense(shape, layer, batch, queries, cache)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        torch.testing.assert_close(out[:rows].double(), expected, atol=tolerance, rtol=tolerance)
        assert (out[rows:] == 7.0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["native", "torch"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_backends_agree_with_the_definition(name: str, dtype: str, data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    shape = AttentionShape(
        num_heads=kv_heads * data.draw(st.sampled_from([1, 2, 3, 5, 9])),
        num_kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([2, 12, 16, 32, 48, 64, 80, 96, 128])),
        block_size=data.draw(st.sampled_from([1, 3, 8, 16, 64])),
        windows=[None, data.draw(st.sampled_from([1, 5, 63, 64, 65]))],
    )
    starts = st.sampled_from([0, 1, 15, 62, 63, 64, 65, 130])
    rows = st.sampled_from([1, 1, 2, 15, 16, 17, 40])
    sequences = data.draw(st.lists(st.tuples(starts, rows), min_size=1, max_size=4))
    check(name, shape, sequences, dtype, data.draw(st.booleans()), int8_kv=data.draw(st.booleans()))


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("int8_kv", [False, True])
def test_long_contexts_cross_many_spans(name: str, int8_kv: bool) -> None:
    shape = AttentionShape(3, 1, 64, 16, [None, 300])
    check(name, shape, [(1000, 1), (700, 3), (0, 290)], int8_kv=int8_kv)


def test_large_scores_do_not_overflow() -> None:
    shape = AttentionShape(2, 1, 32, 16, [None])
    batch, num_blocks = make_batch(np.random.default_rng(1), shape, [(99, 1)])
    for name in ("native", "torch"):
        cache = make_cache(shape, "float32", num_blocks)
        fill(cache, batch, np.random.default_rng(2))
        cache.blocks *= 100
        queries = torch.ones(1, 2, 32) * 50
        out = torch.empty(1, 2, 32)
        backend = make_backend(name, shape, fixed_order=False)
        backend.plan(batch)
        backend.attend(0, queries, cache, out)
        torch.testing.assert_close(
            out.double(), dense(shape, 0, batch, queries, cache), atol=1e-3, rtol=1e-4
        )


def test_damaged_kv_gives_nan_and_not_a_plausible_value() -> None:
    shape = AttentionShape(2, 1, 32, 16, [None])
    batch, num_blocks = make_batch(np.random.default_rng(1), shape, [(99, 1)])
    for name in ("native", "torch"):
        cache = make_cache(shape, "float32", num_blocks)
        fill(cache, batch, np.random.default_rng(2))
        cache.blocks[int(batch.tables[0, 2]), 0, 0, 0, 3] = float("nan")
        out = torch.zeros(1, 2, 32)
        backend = make_backend(name, shape, fixed_order=False)
        backend.plan(batch)
        backend.attend(0, torch.ones(1, 2, 32), cache, out)
        assert out.isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FC00001, 0xFFFFFFFF])
def test_no_kind_of_nan_gets_lost(bits: int) -> None:
    shape = AttentionShape(2, 1, 32, 16, [None])
    batch, num_blocks = make_batch(np.random.default_rng(1), shape, [(99, 1)])
    cache = make_cache(shape, "float32", num_blocks)
    fill(cache, batch, np.random.default_rng(2))
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    cache.blocks[int(batch.tables[0, 2]), 0, 0, 0, 3, 5] = torch.from_numpy(value)[0]
    out = torch.zeros(1, 2, 32)
    backend = make_backend("native", shape, fixed_order=False)
    backend.plan(batch)
    backend.attend(0, torch.ones(1, 2, 32), cache, out)
    assert out.isnan().all()


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize("flags", [("-mno-avx512bf16",), ("-march=x86-64-v3",), ("-march=x86-64",)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_lesser_processors_agree(
    dtype: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = library.compile_library("g++", flags=flags)
    monkeypatch.setattr(library, "load_library", lambda threaded: compiled)
    for head_dim in (12, 64, 80):
        shape = AttentionShape(9, 3, head_dim, 16, [None, 70])
        for int8_kv in (False, True):
            check("native", shape, [(0, 1), (130, 40), (65, 3)], dtype, int8_kv=int8_kv)
    x = torch.randn(3, 200).to(TORCH_DTYPES[dtype])
    native, torchs = (make_layers(name, 1e-5, fixed_order=True) for name in ("native", "torch"))
    for operation in ("swiglu", "rms_norm"):
        rest = () if operation == "swiglu" else (torch.ones(200).to(x.dtype),)
        results = [getattr(layers, operation)(x.clone(), *rest) for layers in (native, torchs)]
        torch.testing.assert_close(*results, rtol=2**-7, atol=1e-5)


def test_without_cuda_xformers_is_never_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # importing it raises
    shape = AttentionShape(2, 2, 32, 64, [None])
    for name in ("auto", "native", "torch"):
        make_backend(name, shape, fixed_order=False)
    with pytest.raises(ModelError, match="needs CUDA"):
        make_backend("xformers", shape, fixed_order=False)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ModelError, match="'flash' is not available"):
        make_backend("flash", AttentionShape(1, 1, 16, 16, [None]), fixed_order=False)


@pytest.fixture
def fresh_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and the memory of the loaded kernel cleared for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "load_library", library.load_library.__wrapped__)
    return tmp_path / "kvbaton"


def test_without_a_compiler_torch_is_used(
    fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fresh_kernel))
    assert library.load_library(threaded=False) is None
    backend = make_backend("auto", AttentionShape(1, 1, 16, 16, [None]), fixed_order=False)
    assert not isinstance(backend, NativeAttention)


def test_a_failing_compiler_is_survived(
    fresh_kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo broken >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert library.load_library(threaded=False) is None
    assert list(fresh_kernel.iterdir()) == []


def test_a_cache_that_others_can_write_is_not_trusted(fresh_kernel: Path) -> None:
    fresh_kernel.mkdir()
    fresh_kernel.chmod(0o777)
    assert library.load_library(threaded=False) is None


def test_processes_that_start_at_once_share_one_kernel(fresh_kernel: Path) -> None:
    code = "from common.engine.native.library import load_library; assert load_library(False)"
    environment = {**os.environ, "PYTHONPATH": "."}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    (compiled,) = fresh_kernel.iterdir()
    assert ctypes.CDLL(str(compiled)).kvbaton_attend


class _DenseKernels:
    """Stands in for xformers' CUDA kernels: the bias made dense, and attention by definition."""

    def __init__(self, fmha: Any) -> None:
        self.attn_bias = fmha.attn_bias
        self.triton_splitk = fmha.triton_splitk
        self.flash = fmha.flash
        self.operators: list[Any] = []

    def memory_efficient_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float, op: Any
    ) -> Tensor:
        self.operators.append(op)
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1
        assert k.shape[2:4] == q.shape[2:4]
        if op is self.triton_splitk.FwOp:
            seqinfo = attn_bias.q_seqinfo
            assert seqinfo.max_seqlen == seqinfo.min_seqlen == 1
            assert attn_bias.page_size % op.BLOCK_N == 0
            assert k.shape[1] % attn_bias.page_size == 0
        mask = attn_bias.materialize((q.shape[1], attn_bias.k_seqinfo.seqstart_py[-1]))
        mask = torch.nn.functional.pad(mask, (0, k.shape[1] - mask.shape[-1]), value=-torch.inf)
        scores = torch.einsum("bqhgd,bkhgd->bhgqk", q, k.nan_to_num()) * scale + mask
        return torch.einsum("bhgqk,bkhgd->bqhgd", scores.softmax(-1), v.nan_to_num())


def device_like_cache(cache: KvCache) -> KvCache:
    """The same KV, laid out as the pool of a GPU: one run of rows per layer."""
    cache.blocks = cache.blocks.permute(1, 2, 0, 4, 3, 5).contiguous().permute(2, 0, 1, 4, 3, 5)
    return cache


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 1)],
        [(63, 1), (64, 1), (200, 1)],
        [(0, 5)],
        [(0, 70), (30, 9)],
        [(10, 1), (0, 66), (130, 1), (64, 64)],
    ],
)
def test_xformers_plans_agree_with_the_definition(sequences: list[tuple[int, int]]) -> None:
    pytest.importorskip("xformers")
    from common.engine.attention.xformers import XformersAttention

    shape = AttentionShape(6, 2, 32, 64, [None, None])
    generator = np.random.default_rng(3)
    batch, num_blocks = make_batch(generator, shape, sequences)
    cache = make_cache(shape, "float32", num_blocks)
    fill(cache, batch, generator)
    rows = int(batch.row_starts[-1])
    queries = torch.from_numpy(generator.normal(size=(rows, 10, 32))).float()[:, :6]
    out = torch.empty(rows, 6, 32)
    backend = XformersAttention(shape, device="cpu")
    kernels = _DenseKernels(backend._fmha)
    backend._fmha = kernels
    backend.plan(batch)
    for layer in range(2):
        expected = dense(shape, layer, batch, queries, cache)
        backend.attend(layer, queries, device_like_cache(cache), out)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    counts = {rows for _, rows in sequences}
    assert (kernels.triton_splitk.FwOp in kernels.operators) == (1 in counts)
    assert (kernels.flash.FwOp in kernels.operators) == (counts != {1})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (AttentionShape(2, 2, 32, 64, [None, 9]), "sliding-window"),
        (AttentionShape(2, 2, 48, 64, [None]), "head_dim 48"),
        (AttentionShape(2, 2, 32, 16, [None]), "multiple of 64"),
        (AttentionShape(2, 2, 32, 64, [None]), "needs CUDA"),
    ],
)
def test_xformers_refuses_what_its_kernels_do_not_take(shape: AttentionShape, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_backend("xformers", shape, fixed_order=False)
