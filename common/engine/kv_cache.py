"""The paged KV: a view of the arena's bytes, into which each step writes its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.quantization import quantise
from common.kv.layout import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORED = {**TORCH_DTYPES, "int8": torch.int8}


class KvCache:
    """`blocks` is [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, row_elements].

    It is the memory itself, shared with other processes, and not a copy: what is written here is
    what another worker reads. A row is head_dim numbers, and in int8 the bytes of their scale; it
    is rounded once, when it is written: see quantization.py.
    """

    def __init__(self, layout: KvLayout, arena: memoryview) -> None:
        """Raises ValueError unless `arena` is writable and a whole number of blocks."""
        if arena.readonly or len(arena) == 0 or len(arena) % layout.block_bytes:
            raise ValueError(
                f"the arena must be writable and a multiple of {layout.block_bytes} bytes, "
                f"got {len(arena)}"
            )
        self.layout = layout
        self.blocks = torch.frombuffer(arena, dtype=_STORED[layout.dtype]).view(
            -1, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.row_elements
        )

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]

    @property
    def is_int8(self) -> bool:
        return self.layout.dtype == "int8"

    def write(self, layer: int, keys_values: Tensor, slots: Tensor, offsets: Tensor) -> None:
        """Store keys_values [tokens, 2, num_kv_heads, head_dim]; token i goes to row offsets[i] of
        block slots[i] (both int64)."""
        rows = quantised_rows(keys_values) if self.is_int8 else keys_values
        self.blocks[:, layer][slots, :, :, offsets] = rows

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """These blocks (int64) in fp32, [len(slots), 2, num_kv_heads, block_size, head_dim]."""
        rows = self.blocks[:, layer].index_select(0, slots)
        return dequantised_rows(rows) if self.is_int8 else rows.float()


def quantised_rows(numbers: Tensor) -> Tensor:
    """Rows as an int8 cache holds them, [..., head_dim + 4], of `numbers` [..., head_dim]."""
    steps, scales = quantise(numbers.reshape(-1, numbers.shape[-1]))
    rows = torch.cat((steps, scales[:, None].view(torch.int8)), dim=1)
    return rows.view(*numbers.shape[:-1], -1)


def dequantised_rows(rows: Tensor) -> Tensor:
    """The numbers of such rows, in fp32."""
    scale_bytes = torch.float32.itemsize
    scales = rows[..., -scale_bytes:].contiguous().view(torch.float32)
    return rows[..., :-scale_bytes].float().mul_(scales)
