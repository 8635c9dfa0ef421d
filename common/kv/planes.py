"""KV blocks made smaller for a slow link, bit for bit the same again: by byte planes. Pure.

Of 16-bit floating point numbers the high byte is a sign and most of an exponent, and exponents of
one block lie close together: most are among 14 binades. A number's high byte becomes four bits, its
sign and one of seven exponents or none (zero); the few others are listed with their places. Low
bytes are as good as random and go as they are: three quarters of the block, in a few passes over
memory. Entropy coders find two thirds or so, an order of magnitude slower: see
docs/decisions/kv-compression.md.

A frame is a header, the codes, the low bytes, the places (32 bits, little endian) and the high
bytes of the others. One of the block's own size is the block itself.
"""

from __future__ import annotations

import numpy as np

from kvbaton.errors import ProtocolError

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

_HEADER_BYTES = 1  # the least of the seven exponents
_OTHER_BYTES = 5  # place and high byte
_MOST_OTHERS = 32  # one in so many: with more the frame is hardly smaller
_NUM_EXPONENTS = 7
_SAMPLED = 16  # one in so many tells where the exponents lie
_EXPONENT, _SIGN, _CODE_SIGN = 0x7F, 0x80, 0x08


def compress(block: bytes | memoryview) -> bytes | memoryview:
    """The frame for a block of 16-bit numbers; the block itself where that would not be smaller."""
    if len(block) % 4:
        return block
    numbers = np.frombuffer(block, "<u2")
    high = (numbers >> 8).astype(np.uint8)
    exponents: Bytes = high & np.uint8(_EXPONENT)
    least = _least(exponents[::_SAMPLED])
    codes = exponents - np.uint8(least - 1)  # what lies below wraps around
    is_coded = codes - np.uint8(1) < _NUM_EXPONENTS
    codes *= is_coded
    places = np.flatnonzero(~(is_coded | (high & _EXPONENT == 0)))
    if len(places) > len(numbers) // _MOST_OTHERS:
        return block
    codes |= (high & _SIGN) >> 4
    pairs = codes.view("<u2")
    packed = (pairs | pairs >> 4).astype(np.uint8)
    others = places.astype("<u4"), high[places]
    parts = packed, numbers.astype(np.uint8), *others
    frame = b"".join((bytes([least]), *(part.tobytes() for part in parts)))
    return frame if len(frame) < len(block) else block


def decompress(frame: bytes | memoryview, block_bytes: int) -> bytes | memoryview:
    """The block. What is allocated is a few times `block_bytes`, whatever the frame holds. Raises
    ProtocolError for one that is not such a frame."""
    if len(frame) == block_bytes:
        return frame
    num_numbers = block_bytes // 2
    fixed_bytes = _HEADER_BYTES + num_numbers // 2 + num_numbers
    num_others, rest = divmod(len(frame) - fixed_bytes, _OTHER_BYTES)
    if block_bytes % 4 or rest or not 0 <= num_others <= num_numbers // _MOST_OTHERS:
        raise ProtocolError(f"{len(frame)} bytes are no compressed block of {block_bytes}")
    parts = np.split(
        np.frombuffer(frame, np.uint8),
        np.cumsum([_HEADER_BYTES, num_numbers // 2, num_numbers, 4 * num_others]),
    )
    header, packed, low, places, others = parts
    pairs = packed.astype("<u2")
    codes = ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
    high = codes & _NUM_EXPONENTS
    high += (high != 0) * np.uint8((int(header[0]) - 1) & _EXPONENT)
    high &= _EXPONENT
    high |= (codes & _CODE_SIGN) << 4
    at = np.frombuffer(places.tobytes(), "<u4")
    if num_others and int(at.max()) >= num_numbers:
        raise ProtocolError("a compressed block lists a place that it does not have")
    high[at] = others
    numbers = high.astype("<u2")
    numbers <<= 8
    numbers |= low
    block: bytes = numbers.tobytes()
    return block


def _least(exponents: Bytes) -> int:
    """The first of the seven exponents in a row that are the most frequent; zero is not counted."""
    counts = np.bincount(exponents, minlength=_EXPONENT + 1)
    counts[0] = 0
    sums = np.cumsum(counts)
    return 1 + int(np.argmax(sums[_NUM_EXPONENTS:] - sums[:-_NUM_EXPONENTS]))
