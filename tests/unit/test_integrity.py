"""Digests of blocks: a value that other implementations can check, and what changes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.kv.integrity import DIGEST_BYTES, block_digest


def test_a_digest_is_xxh3_128_over_key_stamp_and_bytes() -> None:
    assert block_digest(b"key", 1, b"bytes").hex() == "fd99713d25b9cbbaef5d3922f14cc7b0"
    assert len(block_digest(b"key", 1, b"bytes")) == DIGEST_BYTES


def test_memory_and_bytes_have_one_digest() -> None:
    assert block_digest(b"key", 7, memoryview(bytearray(b"abc"))) == block_digest(b"key", 7, b"abc")


def test_key_and_stamp_change_it() -> None:
    digests = {block_digest(key, stamp, b"x") for key in (b"a", b"b") for stamp in (0, 1, 2**63)}
    assert len(digests) == 6


@given(st.binary(min_size=1, max_size=600), st.data())
def test_a_flipped_byte_changes_it(content: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(content) - 1))
    other = bytearray(content)
    other[place] ^= data.draw(st.integers(1, 255))
    assert block_digest(b"key", 1, other) != block_digest(b"key", 1, content)
