"""Attention on CUDA by xformers 0.0.35. The only module that imports xformers, and not before use.

Decode walks the block tables in Triton's split-K kernel (Flash-Decoding). Prefill gathers each
sequence's keys and runs FlashAttention-2 over the packed sequences. The operator is always named:
xformers' own choice takes split-K for small batches alone and then refuses paged biases.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.engine.attention.base import AttentionShape, Batch, Int32Array
from common.engine.config import ModelError
from common.engine.kv_cache import KvCache

_HEAD_DIMS = (16, 32, 64, 128, 256)  # what split-K and FlashAttention-2 both take
_KERNEL_BLOCK = 64  # split-K reads this many keys at a time, all from one page


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of a step that one kernel serves. `rows` is None where they are all rows, in order.

    `gather` [keys], for prefill alone, are the rows of the flattened pool that hold the keys.
    """

    rows: Tensor | None
    bias: Any
    gather: Tensor | None


class XformersAttention:
    """Needs a pool whose `blocks`, shaped as KvCache says, are laid out in memory as
    [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]: the kernels want a layer's keys
    as one run of rows."""

    def __init__(self, shape: AttentionShape, device: str = "cuda") -> None:
        """Raises ModelError without CUDA, and for shapes that the kernels do not take."""
        if any(window is not None for window in shape.windows):
            raise ModelError(
                "sliding-window attention is not supported on CUDA yet; use device cpu"
            )
        if shape.head_dim not in _HEAD_DIMS:
            raise ModelError(f"head_dim {shape.head_dim} is not supported on CUDA: {_HEAD_DIMS}")
        if shape.block_size % _KERNEL_BLOCK:
            raise ModelError(f"block_size on CUDA must be a multiple of {_KERNEL_BLOCK}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelError("attention by xformers needs CUDA, and this machine has none")
        if not _has_module("xformers"):
            raise ModelError("attention by xformers needs its package: pip install '.[cuda]'")
        self.name = "xformers"
        self._shape = shape
        self._device = torch.device(device)
        self._fmha = _load_fmha()
        self._parts: list[Part] = []

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend. One row is decode; more are prefill."""
        counts = np.diff(batch.row_starts)
        groups = (
            (np.flatnonzero(counts == 1), self._plan_decode),
            (np.flatnonzero(counts > 1), self._plan_prefill),
        )
        self._parts = [plan(batch, sequences) for sequences, plan in groups if len(sequences)]

    def part_in_place(self, tables: Tensor, lengths: Tensor) -> Part:
        """A decode step, one row for each sequence, over tensors that may be given other values
        before `attend` runs, or runs again in a CUDA graph.

        tables [sequences, width] and lengths [sequences] are int32 on the device, lengths from 1 to
        width * block_size. The kernel reads them; what the bias knows of lengths besides is not
        used.
        """
        bias = self._paged_bias([1] * len(lengths), tables)
        bias.k_seqinfo.seqlen = lengths
        return Part(None, bias, None)

    def use(self, part: Part) -> None:
        """Instead of `plan`: nothing is copied to the device, so it may be done under capture."""
        self._parts = [part]

    def attend(self, layer: int, queries: Tensor, cache: KvCache, out: Tensor) -> None:
        """See AttentionBackend."""
        shape = self._shape
        groups = shape.num_heads // shape.num_kv_heads
        pool = cache.blocks[:, layer].permute(1, 0, 3, 2, 4)
        keys, values = pool.view(2, -1, shape.num_kv_heads, shape.head_dim).unbind(0)
        for part in self._parts:
            count = part.bias.q_seqinfo.seqstart_py[-1]
            mine = queries[:count] if part.rows is None else queries.index_select(0, part.rows)
            decode = part.gather is None
            operator = self._fmha.triton_splitk.FwOp if decode else self._fmha.flash.FwOp
            k, v = (
                self._expand(rows if part.gather is None else rows.index_select(0, part.gather))
                for rows in (keys, values)
            )
            result = self._fmha.memory_efficient_attention_forward(
                mine.reshape(1, count, shape.num_kv_heads, groups, shape.head_dim),
                k,
                v,
                attn_bias=part.bias,
                scale=shape.scale,
                op=operator,
            ).view(count, shape.num_heads, shape.head_dim)
            if part.rows is None:
                out[:count] = result
            else:
                out.index_copy_(0, part.rows, result)

    def _expand(self, rows: Tensor) -> Tensor:
        """[keys, kv_heads, dim] as [1, keys, kv_heads, group, dim] with stride 0 over the group."""
        groups = self._shape.num_heads // self._shape.num_kv_heads
        return rows[None, :, :, None].expand(1, -1, -1, groups, -1)

    def _plan_decode(self, batch: Batch, sequences: np.ndarray[Any, Any]) -> Part:
        # The padding names block 0 and lies beyond every length.
        lengths = batch.lengths()[sequences]
        used = int(-(-lengths.max() // self._shape.block_size))
        tables = np.zeros((len(sequences), table_width(used)), dtype=np.int32)
        tables[:, :used] = batch.tables[sequences, :used]
        bias = self._paged_bias(lengths.tolist(), torch.from_numpy(tables).to(self._device))
        return Part(self._rows(batch, sequences), bias, None)

    def _paged_bias(self, lengths: list[int], tables: Tensor) -> Any:
        return self._fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * len(lengths),
            kv_seqlen=lengths,
            block_tables=tables,
            page_size=self._shape.block_size,
            device=self._device,
        )

    def _plan_prefill(self, batch: Batch, sequences: np.ndarray[Any, Any]) -> Part:
        size = self._shape.block_size
        lengths = batch.lengths()[sequences]
        owners = np.repeat(sequences, lengths)
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        gather = batch.tables[owners, positions // size].astype(np.int64) * size + positions % size
        bias = self._fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            q_seqlen=np.diff(batch.row_starts)[sequences].tolist(),
            kv_seqlen=lengths.tolist(),
            device=self._device,
        )
        return Part(self._rows(batch, sequences), bias, torch.from_numpy(gather).to(self._device))

    def _rows(self, batch: Batch, sequences: np.ndarray[Any, Any]) -> Tensor | None:
        if len(sequences) == batch.num_sequences:
            return None
        return torch.from_numpy(_rows_of(batch.row_starts, sequences)).to(self._device)


def table_width(num_blocks: int) -> int:
    """The width of a table of so many blocks. The kernel splits its work by it, and is compiled for
    each split: widths are powers of two, so that there are few."""
    return 1 << (num_blocks - 1).bit_length()


def _rows_of(row_starts: Int32Array, sequences: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate(
        [np.arange(row_starts[index], row_starts[index + 1]) for index in sequences]
    )


def _load_fmha() -> Any:
    """xformers.ops.fmha, after the CUDA runtime that its wheel was linked with, where that is here.

    The wheel wants libcudart.so.12 whatever runtime torch brings; without it xformers still imports
    but takes itself for a build without CUDA.
    """
    runtime = importlib.util.find_spec("nvidia.cuda_runtime") if _has_module("nvidia") else None
    for folder in (runtime.submodule_search_locations or ()) if runtime else ():
        library = Path(folder) / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from xformers import _cpp_lib
    from xformers.ops import fmha

    if torch.cuda.is_available() and not _cpp_lib._built_with_cuda:
        raise ModelError(
            "xformers finds no libcudart.so.12: install nvidia-cuda-runtime-cu12 beside torch"
        )
    return fmha


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
