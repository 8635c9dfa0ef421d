"""Paged attention on any device by torch's scaled_dot_product_attention over gathered blocks.

For what the kernels of xformers do not take (float32, sliding windows, other head sizes), and where
xformers is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.attention.base import AttentionShape, Batch
from common.engine.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Rows of the step and blocks of the pool; a mask [rows, length] for each distinct window."""

    rows: slice
    table: Tensor
    length: int
    masks: dict[int | None, Tensor]


class GatheredAttention:
    """One call for each sequence and layer: right everywhere, fast nowhere."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self.name = "gathered"
        self._shape = shape
        self._device = device
        self._sequences: list[_Sequence] = []

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend."""
        self._sequences = [self._plan_one(batch, index) for index in range(batch.num_sequences)]

    def _plan_one(self, batch: Batch, index: int) -> _Sequence:
        begin, end = (int(row) for row in batch.row_starts[index : index + 2])
        start = int(batch.starts[index])
        length = start + end - begin
        num_blocks = -(-length // self._shape.block_size)
        table = torch.from_numpy(batch.tables[index, :num_blocks]).to(self._device)
        # How many positions before its own each row looks back, for each position it may see.
        at = torch.arange(start, length, device=self._device)
        back = at[:, None] - torch.arange(length, device=self._device)
        masks = {
            window: (back >= 0) & (back < (length if window is None else window))
            for window in set(self._shape.windows)
        }
        return _Sequence(slice(begin, end), table, length, masks)

    def attend(self, layer: int, queries: Tensor, cache: KvCache, out: Tensor) -> None:
        """See AttentionBackend."""
        window = self._shape.windows[layer]
        for sequence in self._sequences:
            blocks = cache.blocks[:, layer].index_select(0, sequence.table)
            pages = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : sequence.length]
            attended = functional.scaled_dot_product_attention(
                queries[sequence.rows].transpose(0, 1)[None],
                pages[0][None],
                pages[1][None],
                attn_mask=sequence.masks[window],
                scale=self._shape.scale,
                enable_gqa=True,
            )
            out[sequence.rows] = attended[0].transpose(0, 1)
