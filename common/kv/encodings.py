"""How block bytes are written while they move, by name; the names are those of messages. Pure.

numpy is loaded once something is encoded, in whichever thread does it.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.kv.layout import KvLayout

PLANES = "planes"
INT8 = "int8"  # what is read is not what was written

Blocks = Sequence[bytes | memoryview]


def encode(encoding: str, blocks: Blocks, layout: KvLayout) -> Blocks:
    """A frame for each block."""
    if encoding == INT8:
        from common.kv.int8 import quantize

        return [quantize(block, layout) for block in blocks]
    from common.kv.planes import compress

    return [compress(block) for block in blocks]


def decode(encoding: str, frames: Blocks, layout: KvLayout) -> Blocks:
    """The block of each frame. Raises ProtocolError."""
    if encoding == INT8:
        from common.kv.int8 import dequantize

        return [dequantize(frame, layout) for frame in frames]
    from common.kv.planes import decompress

    return [decompress(frame, layout.block_bytes) for frame in frames]
