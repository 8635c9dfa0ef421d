"""KV blocks in half their bytes, not the same again: eight bits a number, a scale a head. Pure.

A block's numbers of one layer, one head, keys or values, are multiples of the largest among them
over 127, rounded to the nearest: what comes back is off by half of such a step at most, and by
bfloat16's own rounding. Blocks of other numbers than bfloat16, or with any that is not finite, go
as they are.

A frame is the scales (32 bits floating point, little endian, by layer, keys and values, head) and
the numbers. One of the block's own size is the block itself.
"""

from __future__ import annotations

import numpy as np

from common.kv.layout import KvLayout
from kvbaton.errors import ProtocolError

_STEPS = 127
_SCALE_BYTES = 4


def quantize(block: bytes | memoryview, layout: KvLayout) -> bytes | memoryview:
    """The frame for a block."""
    if layout.dtype != "bfloat16":
        return block
    numbers = (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)
    numbers = numbers.reshape(_num_scales(layout), -1)
    scales = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(_STEPS)
    if not np.isfinite(scales).all():
        return block
    steps = np.rint(numbers / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    frame: bytes = scales.astype("<f4").tobytes() + steps.tobytes()
    return frame if len(frame) < len(block) else block


def dequantize(frame: bytes | memoryview, layout: KvLayout) -> bytes | memoryview:
    """A block of bfloat16 numbers near those that it had. What is allocated follows from the
    layout. Raises ProtocolError for what is no such frame."""
    if len(frame) == layout.block_bytes:
        return frame
    num_scales = _num_scales(layout)
    if len(frame) != num_scales * _SCALE_BYTES + layout.block_bytes // 2:
        raise ProtocolError(
            f"{len(frame)} bytes are no block of {layout.block_bytes} in eight bits a number"
        )
    scales = np.frombuffer(frame, "<f4", num_scales)
    if layout.dtype != "bfloat16" or not np.isfinite(scales).all():
        raise ProtocolError("a block in eight bits a number has scales that are no numbers")
    steps = np.frombuffer(frame, np.int8, offset=num_scales * _SCALE_BYTES)
    with np.errstate(over="ignore"):
        numbers = steps.reshape(num_scales, -1) * scales[:, None]
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, and of two to the even one
    block: bytes = (bits >> 16).astype("<u2").tobytes()
    return block


def _num_scales(layout: KvLayout) -> int:
    return layout.num_layers * 2 * layout.num_kv_heads
