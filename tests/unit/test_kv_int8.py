"""KV in eight bits a number: the error is bounded, and hostile frames are not believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.kv.int8 import dequantize, quantize
from common.kv.layout import KvLayout
from kvbaton.errors import ProtocolError

LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="bfloat16")
NUM_SCALES, PER_SCALE = 12, 32


def block_of(numbers: np.ndarray) -> bytes:
    """As bfloat16, cut off."""
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def numbers_of(block: bytes | memoryview) -> np.ndarray:
    bits = np.frombuffer(block, "<u2").astype(np.uint32) << 16
    return bits.view(np.float32).reshape(NUM_SCALES, PER_SCALE)


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 8))
def test_a_number_is_off_by_half_a_step_and_a_rounding_at_most(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    scales = np.exp(spread * random.normal(size=(NUM_SCALES, 1)))
    block = block_of(random.normal(size=(NUM_SCALES, PER_SCALE)) * scales)
    frame = quantize(block, LAYOUT)
    assert len(frame) == len(block) // 2 + 4 * NUM_SCALES
    before, after = numbers_of(block), numbers_of(dequantize(frame, LAYOUT))
    step = np.abs(before).max(axis=1, keepdims=True) / 127
    assert (np.abs(after - before) <= step / 2 + np.abs(after) / 256 + 1e-30).all()
    again = numbers_of(dequantize(quantize(block_of(after), LAYOUT), LAYOUT))
    assert (np.abs(again - after) <= step * 0.6 + np.abs(after) / 128 + 1e-30).all()


def test_nothing_stays_nothing_and_what_has_no_size_goes_as_it_is() -> None:
    zeros = bytes(LAYOUT.block_bytes)
    assert bytes(dequantize(quantize(zeros, LAYOUT), LAYOUT)) == zeros
    for wrong in (np.nan, np.inf):
        block = block_of(np.full(NUM_SCALES * PER_SCALE, wrong))
        assert quantize(block, LAYOUT) == block
        assert dequantize(block, LAYOUT) == block


@given(st.binary(max_size=1000))
def test_a_hostile_frame_is_a_block_or_refused(frame: bytes) -> None:
    try:
        assert len(dequantize(frame, LAYOUT)) == LAYOUT.block_bytes
    except ProtocolError:
        assert len(frame) != LAYOUT.block_bytes


def test_sizes_and_scales_are_checked() -> None:
    frame = bytes(quantize(block_of(np.ones(NUM_SCALES * PER_SCALE)), LAYOUT))
    for wrong in (b"", frame[:-1], frame + b"\0"):
        with pytest.raises(ProtocolError, match="in eight bits a number"):
            dequantize(wrong, LAYOUT)
    for number in (np.nan, np.inf):
        scales = np.full(NUM_SCALES, number, "<f4").tobytes()
        with pytest.raises(ProtocolError, match="scales that are no numbers"):
            dequantize(scales + frame[len(scales) :], LAYOUT)
