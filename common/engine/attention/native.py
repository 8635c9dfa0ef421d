"""Paged attention on the CPU by native/attention.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from common.engine.attention.base import AttentionShape, Batch
from common.engine.kv_cache import KvCache
from common.engine.native import structs
from common.engine.native.library import build_name


class NativeAttention:
    """Attends over the arena in place; ctypes releases the interpreter lock meanwhile.

    With `fixed_order` a row's bits depend on its own sequence alone.
    """

    def __init__(self, shape: AttentionShape, library: ctypes.CDLL, *, fixed_order: bool) -> None:
        self.name = build_name(library)
        self._shape = shape
        self._attend = library.kvbaton_attend
        self._attend.restype = None
        self._problem = structs.Problem(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            fixed_order=fixed_order,
            scale=shape.scale,
        )
        self._batch: Batch | None = None  # keeps the arrays alive that the problem points to

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend. The arrays are handed to C as they are."""
        assert batch.tables.flags.c_contiguous
        self._batch = batch
        problem = self._problem
        problem.row_starts = batch.row_starts.ctypes.data
        problem.starts = batch.starts.ctypes.data
        problem.tables = batch.tables.ctypes.data
        problem.table_stride = batch.tables.shape[1]
        problem.num_sequences = batch.num_sequences

    def attend(self, layer: int, queries: Tensor, cache: KvCache, out: Tensor) -> None:
        """See AttentionBackend."""
        assert queries.stride()[1:] == out.stride()[1:] == (self._shape.head_dim, 1)
        problem, keys = self._problem, cache.blocks[0, layer]
        problem.query_stride = queries.stride(0)
        problem.out_stride = out.stride(0)
        problem.block_stride = cache.blocks.stride(0)
        problem.value_offset = keys.stride(0)
        problem.window = self._shape.windows[layer] or 0
        self._attend(
            ctypes.byref(problem),
            ctypes.c_void_p(queries.data_ptr()),
            ctypes.c_void_p(keys.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            int(queries.dtype is torch.bfloat16),
            int(cache.is_int8),
            torch.get_num_threads(),
        )
