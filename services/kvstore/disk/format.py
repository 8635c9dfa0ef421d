"""Segment files: a header, then records of one size, each a header and the bytes of a block. Pure.

A record's place follows from its number alone, so a damaged one hides no other. Every header has a
checksum. A block's digest covers the stamp of its segment, so what an earlier file left in the same
place on the disk does not pass for it.
"""

from __future__ import annotations

import hashlib
import re
import struct

import xxhash

from common.kv.hashing import KEY_BYTES
from common.kv.integrity import DIGEST_BYTES
from services.kvstore.blocks import BlockName

_CHECKSUM = struct.Struct("<Q")
_SEGMENT = struct.Struct("<8sQQ32s")  # magic, stamp, bytes of a block, hash of the fingerprint
_SEGMENT_MAGIC = b"kvbseg\x00\x01"
_RECORD = struct.Struct(f"<4s3BxQ{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s{DIGEST_BYTES}s")
_RECORD_MAGIC = b"kvb\x01"

SEGMENT_HEADER_BYTES = _SEGMENT.size + _CHECKSUM.size
RECORD_HEADER_BYTES = _RECORD.size + _CHECKSUM.size

_NAME = re.compile(r"([0-9]{12})\.segment")


def segment_name(number: int) -> str:
    """The file of a segment. Numbers rise with each new one."""
    return f"{number:012d}.segment"


def segment_number(name: str) -> int | None:
    """The number of the segment in this file; None if it is another kind of file."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def record_offset(slot: int, block_bytes: int) -> int:
    """Where the record of this number begins; also the size of a segment with so many records."""
    return SEGMENT_HEADER_BYTES + slot * (RECORD_HEADER_BYTES + block_bytes)


def pack_segment(stamp: int, block_bytes: int, fingerprint: str) -> bytes:
    """The header of a segment."""
    return _sealed(_SEGMENT.pack(_SEGMENT_MAGIC, stamp, block_bytes, _short(fingerprint)))


def unpack_segment(header: bytes | memoryview, block_bytes: int, fingerprint: str) -> int | None:
    """The segment's stamp; None if the header is damaged or of another model or layout."""
    content = _unsealed(header, SEGMENT_HEADER_BYTES)
    if content is None:
        return None
    stamp: int
    _, stamp, _, _ = _SEGMENT.unpack(content)
    return stamp if bytes(header) == pack_segment(stamp, block_bytes, fingerprint) else None


def pack_record(name: BlockName, stamp: int, digest: bytes) -> bytes:
    """The header of a record. What names a block has at most 32 bytes each."""
    assert all(len(field) <= KEY_BYTES for field in name)
    return _sealed(_RECORD.pack(_RECORD_MAGIC, *map(len, name), stamp, *name, digest))


def unpack_record(header: bytes | memoryview, stamp: int) -> tuple[BlockName, bytes] | None:
    """The block's name and digest; None if the header is damaged or of another segment."""
    content = _unsealed(header, RECORD_HEADER_BYTES)
    if content is None:
        return None
    magic, num_key, num_parent, num_tenant, written, key, parent, tenant, digest = _RECORD.unpack(
        content
    )
    if magic != _RECORD_MAGIC or written != stamp:
        return None
    return BlockName(key[:num_key], parent[:num_parent], tenant[:num_tenant]), digest


def _short(fingerprint: str) -> bytes:
    return hashlib.blake2b(fingerprint.encode(), digest_size=32).digest()


def _sealed(content: bytes) -> bytes:
    return content + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(content))


def _unsealed(header: bytes | memoryview, num_bytes: int) -> bytes | None:
    if len(header) != num_bytes:
        return None
    content = bytes(header[: -_CHECKSUM.size])
    return content if _sealed(content) == bytes(header) else None
