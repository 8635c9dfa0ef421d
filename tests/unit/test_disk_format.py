"""Headers of segment files: what is packed is unpacked, what is damaged is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.kvstore.blocks import BlockName
from services.kvstore.disk.format import (
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    pack_record,
    pack_segment,
    record_offset,
    segment_name,
    segment_number,
    unpack_record,
    unpack_segment,
)

short = st.binary(max_size=32)
names = st.builds(BlockName, key=short, parent=short, tenant=short)
stamps = st.integers(0, 2**64 - 1)
DIGEST = bytes(range(16))


@given(names, stamps)
def test_a_record_header_comes_back(name: BlockName, stamp: int) -> None:
    header = pack_record(name, stamp, DIGEST)
    assert len(header) == RECORD_HEADER_BYTES
    assert unpack_record(header, stamp) == (name, DIGEST)
    assert unpack_record(header, stamp ^ 1) is None


def damaged(data: st.DataObject, header: bytes) -> bytes:
    place = data.draw(st.integers(0, len(header) - 1))
    change = data.draw(st.integers(1, 255))
    return header[:place] + bytes([header[place] ^ change]) + header[place + 1 :]


def truncated(data: st.DataObject, header: bytes) -> bytes:
    return header[: data.draw(st.integers(0, len(header) - 1))]


@given(st.data(), names)
def test_a_damaged_record_header_is_none(data: st.DataObject, name: BlockName) -> None:
    header = pack_record(name, 1, DIGEST)
    assert unpack_record(damaged(data, header), 1) is None
    assert unpack_record(truncated(data, header), 1) is None


@given(st.data())
def test_a_damaged_segment_header_is_none(data: st.DataObject) -> None:
    header = pack_segment(5, 64, "model")
    assert len(header) == SEGMENT_HEADER_BYTES
    assert unpack_segment(header, 64, "model") == 5
    assert unpack_segment(damaged(data, header), 64, "model") is None
    assert unpack_segment(truncated(data, header), 64, "model") is None


def test_a_segment_of_another_model_or_block_size_is_none() -> None:
    header = pack_segment(5, 64, "model")
    assert unpack_segment(header, 64, "other") is None
    assert unpack_segment(header, 65, "model") is None


def test_records_follow_each_other() -> None:
    assert record_offset(0, 100) == SEGMENT_HEADER_BYTES
    assert record_offset(3, 100) == SEGMENT_HEADER_BYTES + 3 * (RECORD_HEADER_BYTES + 100)


def test_only_segments_have_the_names_of_segments() -> None:
    assert segment_number(segment_name(17)) == 17
    for name in ("secret", "secret.new", "17.segment", segment_name(17) + ".new", ""):
        assert segment_number(name) is None
