"""The paged KV: a view of the arena's bytes, into which each step writes its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from common.kv.layout import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class KvCache:
    """`blocks` is [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim].

    It is the memory itself, shared with other processes, and not a copy: what is written here is
    what another worker reads.
    """

    def __init__(self, layout: KvLayout, arena: memoryview) -> None:
        """Raises ValueError unless `arena` is writable and a whole number of blocks."""
        if arena.readonly or len(arena) == 0 or len(arena) % layout.block_bytes:
            raise ValueError(
                f"the arena must be writable and a multiple of {layout.block_bytes} bytes, "
                f"got {len(arena)}"
            )
        self.layout = layout
        self.blocks = torch.frombuffer(arena, dtype=TORCH_DTYPES[layout.dtype]).view(
            -1, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim
        )

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]

    def write(self, layer: int, keys_values: Tensor, slots: Tensor, offsets: Tensor) -> None:
        """Store keys_values [tokens, 2, num_kv_heads, head_dim]; token i goes to row offsets[i] of
        block slots[i] (both int64)."""
        self.blocks[:, layer][slots, :, :, offsets] = keys_values
