"""The blocking work on segment files: it runs in the thread of the files, never on the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from common.kv.integrity import block_digest
from common.seams import Files
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
from services.kvstore.disk.index import Place, Segment, Write


class Failure(Enum):
    """Why a block could not be read."""

    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    REMOVED = "removed"  # its segment, while the load waited


@dataclass(frozen=True, slots=True)
class SegmentFiles:
    """The segments of one folder, for one model and layout."""

    files: Files
    folder: str
    block_bytes: int
    fingerprint: str

    def list_segments(self) -> dict[int, int]:
        """Sizes in bytes of the segments, by number."""
        numbered = {
            segment_number(name): size for name, size in self.files.list_folder(self.folder).items()
        }
        return {number: size for number, size in numbered.items() if number is not None}

    def scan(self, number: int, num_bytes: int) -> Segment:
        """What a file holds, by its headers; block bytes are checked when they are loaded."""
        segment = Segment(number, None, num_bytes)
        try:
            header = self._read(number, 0, SEGMENT_HEADER_BYTES)
            segment.stamp = unpack_segment(header, self.block_bytes, self.fingerprint)
            if segment.stamp is None:
                return segment
            slot = 0
            while record_offset(slot + 1, self.block_bytes) <= num_bytes:
                offset = record_offset(slot, self.block_bytes)
                record = unpack_record(
                    self._read(number, offset, RECORD_HEADER_BYTES), segment.stamp
                )
                if record is not None:
                    segment.keys[slot] = record[0].key
                slot += 1
        except OSError:
            segment.stamp = None
            segment.keys.clear()
        return segment

    def remove(self, segments: Sequence[Segment]) -> None:
        """Raises OSError."""
        for segment in segments:
            self.files.remove(self._path(segment.number))

    def write(self, write: Write, entries: Sequence[tuple[BlockName, memoryview]]) -> None:
        """Raises OSError; then some of the records may have been written."""
        self.remove(write.doomed)
        stamp = write.segment.stamp
        assert stamp is not None
        parts = []
        offset = record_offset(write.first_slot, self.block_bytes)
        if write.first_slot == 0:
            parts.append(memoryview(pack_segment(stamp, self.block_bytes, self.fingerprint)))
            offset = 0
        for name, memory in entries:
            assert memory.nbytes == self.block_bytes
            digest = block_digest(name.key, stamp, memory)
            parts += [memoryview(pack_record(name, stamp, digest)), memory]
        self.files.write(self._path(write.segment.number), offset, parts)

    def read(
        self, requests: Sequence[tuple[bytes, Place, memoryview]]
    ) -> list[BlockName | Failure]:
        """Read blocks into memory. After a failure the memory holds anything."""
        return [self._read_block(*request) for request in requests]

    def _read_block(self, key: bytes, place: Place, memory: memoryview) -> BlockName | Failure:
        stamp = place.segment.stamp
        assert stamp is not None
        assert memory.nbytes == self.block_bytes
        header = memoryview(bytearray(RECORD_HEADER_BYTES))
        offset = record_offset(place.slot, self.block_bytes)
        try:
            self.files.read(self._path(place.segment.number), offset, [header, memory])
        except FileNotFoundError:
            return Failure.REMOVED
        except OSError:
            return Failure.UNREADABLE
        record = unpack_record(header, stamp)
        if record is None:
            return Failure.CORRUPT
        name, digest = record
        return name if block_digest(key, stamp, memory) == digest else Failure.CORRUPT

    def _read(self, number: int, offset: int, num_bytes: int) -> memoryview:
        header = memoryview(bytearray(num_bytes))
        return header[: self.files.read(self._path(number), offset, [header])]

    def _path(self, number: int) -> str:
        return f"{self.folder}/{segment_name(number)}"
