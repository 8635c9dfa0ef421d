"""Blocks compressed by byte planes are the same again, whatever they hold; hostile frames are not
believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.kv.planes import compress, decompress
from kvbaton.errors import ProtocolError

KV_LIKE = 4096


def kv_like(num_numbers: int, seed: int = 0, channels: int = 64) -> bytes:
    """bfloat16 numbers of other sizes in each channel, some of them nothing, some huge."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.normal(size=channels))
    numbers = random.normal(size=(num_numbers // channels, channels)) * scales
    numbers[random.random(numbers.shape) < 0.01] = 0.0
    numbers[random.random(numbers.shape) < 0.001] *= 1e30
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


@given(st.binary(max_size=2000))
def test_any_bytes_are_the_same_again(block: bytes) -> None:
    frame = compress(block)
    assert len(frame) <= len(block)
    assert bytes(decompress(frame, len(block))) == block


@given(
    seed=st.integers(0, 2**32 - 1),
    num_numbers=st.sampled_from([64, 1024, 8192]),
    changes=st.lists(st.tuples(st.integers(0, 16383), st.integers(0, 255)), max_size=60),
)
def test_any_numbers_are_the_same_again(
    seed: int, num_numbers: int, changes: list[tuple[int, int]]
) -> None:
    block = bytearray(kv_like(num_numbers, seed))
    for place, value in changes:
        block[place % len(block)] = value
    assert bytes(decompress(compress(bytes(block)), len(block))) == bytes(block)


def test_numbers_such_as_those_of_kv_are_a_quarter_smaller() -> None:
    block = kv_like(1 << 16)
    assert len(compress(block)) < 0.77 * len(block)
    zeros = bytes(len(block))
    assert len(compress(zeros)) < 0.751 * len(block)
    noise = np.random.default_rng(1).bytes(len(block))
    assert compress(noise) == noise  # as it is: nothing is gained


def test_every_sixteen_bits_there_are_come_back() -> None:
    block = np.arange(1 << 16, dtype="<u2").tobytes()
    assert bytes(decompress(compress(block), len(block))) == block
    for high in range(256):  # each exponent alone, where it is the most frequent
        same = np.full(1024, high << 8 | 0x55, "<u2")
        same[::100] = np.arange(11, dtype="<u2") * 5000
        assert bytes(decompress(compress(same.tobytes()), 2048)) == same.tobytes()


@given(frame=st.binary(max_size=1200), block_bytes=st.sampled_from([0, 1, 4, 64, 1024, 1500]))
def test_a_hostile_frame_is_a_block_or_refused(frame: bytes, block_bytes: int) -> None:
    try:
        block = decompress(frame, block_bytes)
    except ProtocolError:
        assert len(frame) != block_bytes
    else:
        assert len(block) == block_bytes


def test_sizes_and_places_are_checked_before_anything_is_made_of_them() -> None:
    block = kv_like(KV_LIKE)
    frame = bytes(compress(block))
    for wrong in (b"", frame[:-1], frame + b"\0", frame[:-5] if len(frame) % 5 else frame[:100]):
        with pytest.raises(ProtocolError, match="are no compressed block of"):
            decompress(wrong, 1 << 40)
    with pytest.raises(ProtocolError, match="are no compressed block of"):
        decompress(frame, 2 * len(block))
    fixed = 1 + KV_LIKE // 2 + KV_LIKE
    assert len(frame) > fixed + 5  # it lists others
    beyond = bytearray(frame)
    beyond[fixed : fixed + 4] = KV_LIKE.to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="a place that it does not have"):
        decompress(bytes(beyond), len(block))
    with pytest.raises(ProtocolError, match="are no compressed block of"):
        decompress(frame + bytes(5 * KV_LIKE), len(block))
