"""How block bytes are written while they move, by name; the names are those of messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from common.kv import int8, planes
from common.kv.layout import KvLayout

PLANES = "planes"
INT8 = "int8"  # what is read is not what was written

Blocks = Sequence[bytes | memoryview]


def encode(encoding: str, blocks: Blocks, layout: KvLayout) -> Blocks:
    """A frame for each block."""
    if encoding == INT8:
        return [int8.quantize(block, layout) for block in blocks]
    return [planes.compress(block) for block in blocks]


def decode(encoding: str, frames: Blocks, layout: KvLayout) -> Blocks:
    """The block of each frame. Raises ProtocolError."""
    if encoding == INT8:
        return [int8.dequantize(frame, layout) for frame in frames]
    return [planes.decompress(frame, layout.block_bytes) for frame in frames]
