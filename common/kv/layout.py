"""The shape of a KV block: only workers that agree on it share an arena."""

from __future__ import annotations

from typing import Annotated

import msgspec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int8": 1}
SCALE_BYTES = 4  # a float32 after each row of int8


Extent = Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One block is contiguous: [num_layers, 2 (K, V), num_kv_heads, block_size, head_dim] of dtype.

    Block-major, so that a block moves, is checked and is evicted as one range of bytes. After each
    row of head_dim int8 lies its scale, a float32 of the machine's own byte order.
    `first_kv_head` and `num_kv_heads` give the head range, for workers that hold some of the heads.
    """

    num_layers: Extent
    num_kv_heads: Extent
    head_dim: Extent
    block_size: Extent
    dtype: Annotated[str, msgspec.Meta(pattern="^(bfloat16|float16|float32|uint8|int8)$")]
    first_kv_head: Annotated[int, msgspec.Meta(ge=0, le=2**16)] = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        rows = self.num_layers * 2 * self.num_kv_heads * self.block_size
        return rows * self.row_elements * DTYPE_BYTES[self.dtype]

    @property
    def row_elements(self) -> int:
        """Elements of dtype that one position and head take in the keys, or in the values."""
        return self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)
