"""Paged attention on the CPU, in torch: block tables are walked in spans of bounded length."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.engine.attention.base import AttentionShape, Batch
from common.engine.invariance import in_fixed_parts
from common.engine.kv_cache import KvCache

_SPAN = 256  # positions gathered at a time
_TILE = 256  # query rows at a time
_FIXED_TILE = 16
_UNSEEN = -1e30  # a running maximum below any score, and finite: -inf less -inf is NaN


class CpuAttention:
    """Online softmax over spans of keys, in fp32 (FlashAttention-2, algorithm 1; Milakov and
    Gimelshein, 2018, for the running maximum).

    With `fixed_order` tiles of queries and spans are padded to one shape, spans start at multiples
    of their length, and exp runs in parts that no thread splits: a row's bits then depend on its
    own sequence alone.
    """

    def __init__(self, shape: AttentionShape, *, fixed_order: bool) -> None:
        self.name = "torch"
        self.shape = shape
        self.fixed_order = fixed_order
        self.span = -(-_SPAN // shape.block_size) * shape.block_size
        self.tile = _FIXED_TILE if fixed_order else _TILE
        self._batch: Batch | None = None
        self._tables = torch.empty(0)

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        # Padded to whole spans; the block that the padding names is read but masked.
        per_span = self.span // self.shape.block_size
        padding = -batch.tables.shape[1] % per_span
        self._tables = torch.from_numpy(np.pad(batch.tables, ((0, 0), (0, padding))))

    def attend(self, layer: int, queries: Tensor, cache: KvCache, out: Tensor) -> None:
        batch = self._batch
        assert batch is not None
        for sequence in range(batch.num_sequences):
            begin, end = (int(row) for row in batch.row_starts[sequence : sequence + 2])
            first = int(batch.starts[sequence])
            for row in range(begin, end, self.tile):
                rows = slice(row, min(row + self.tile, end))
                out[rows] = self._tile(
                    layer, queries[rows], first + row - begin, self._tables[sequence], cache
                )

    def _tile(
        self, layer: int, queries: Tensor, position: int, table: Tensor, cache: KvCache
    ) -> Tensor:
        """Attention of queries [rows, heads, head_dim] at `position` and the positions after it."""
        shape, window = self.shape, self.shape.windows[layer]
        count = len(queries)
        padded = self.tile if self.fixed_order else count
        groups = shape.num_heads // shape.num_kv_heads
        tile = torch.zeros(padded, shape.num_kv_heads, groups, shape.head_dim)
        tile[:count] = queries.view(count, shape.num_kv_heads, groups, shape.head_dim)
        tile = (
            tile.mul_(shape.scale).transpose(0, 1).reshape(shape.num_kv_heads, -1, shape.head_dim)
        )
        at = torch.arange(position, position + padded).repeat_interleave(groups)[:, None]
        top = tile.new_full((*tile.shape[:2], 1), _UNSEEN)
        total = torch.zeros_like(top)
        result = torch.zeros_like(tile)
        end = position + count
        lowest = 0 if window is None else max(0, position - window + 1)
        for start in range(lowest // self.span * self.span, end, self.span):
            keys, values = self._gather(layer, table, start, end, cache)
            scores = tile @ keys.transpose(1, 2)
            seen = torch.arange(start, start + keys.shape[1])
            hidden = seen > at if window is None else (seen > at) | (seen <= at - window)
            scores.masked_fill_(hidden, -torch.inf)
            above = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = self._exp(scores.sub_(above))
            shrink = self._exp(top - above)
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            result = result.mul_(shrink).add_(weights @ values)
            top = above
        attended = (result / total).view(shape.num_kv_heads, padded, groups, shape.head_dim)
        return attended.transpose(0, 1)[:count].reshape(queries.shape)

    def _gather(
        self, layer: int, table: Tensor, start: int, end: int, cache: KvCache
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of positions [start, min(start + span, end)), each [kv_heads, span, dim].

        Memory that no position below `end` has written may hold anything, NaN included, and a
        weight of zero does not hide NaN: it is cleared.
        """
        size = self.shape.block_size
        length = min(self.span, end - start)
        num_blocks = self.span // size if self.fixed_order else -(-length // size)
        slots = table[start // size : start // size + num_blocks]
        pages = cache.read(layer, slots)
        pages = pages.permute(1, 2, 0, 3, 4).reshape(
            2, self.shape.num_kv_heads, num_blocks * size, self.shape.head_dim
        )
        pages[:, :, length:] = 0
        return pages[0], pages[1]

    def _exp(self, x: Tensor) -> Tensor:
        return in_fixed_parts(Tensor.exp_, x) if self.fixed_order else x.exp_()
