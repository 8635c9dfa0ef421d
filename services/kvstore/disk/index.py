"""Which block is where in which segment, and what goes when the budget is used up. Pure.

Segments are written one after the other and removed whole, the oldest first. Blocks are evicted
from memory leaves first, so the ends of chains also leave the disk before their beginnings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.config import StartError
from services.kvstore.disk.format import record_offset

_SEGMENT_BYTES = 64 << 20
_SEGMENT_SHARE = 16  # a segment is at most one part in so many of the budget
_SAFE_SHARE = 0.75  # blocks in older segments are written anew when they are stored again
_FEWEST_RECORDS = 4
_FEWEST_SEGMENTS = 2
_OTHER_BYTES = 4096  # for the secret


@dataclass(eq=False, slots=True)
class Segment:
    """One file. What cannot be read here (stamp None) only takes room until it is removed."""

    number: int
    stamp: int | None
    num_bytes: int  # at most so many are on the disk
    num_records: int = 0
    keys: dict[int, bytes] = field(default_factory=dict)  # slot -> key


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is."""

    segment: Segment
    slot: int


@dataclass(frozen=True, slots=True)
class Write:
    """Where the next `num_records` records go, and what has to be removed before."""

    segment: Segment
    first_slot: int
    num_records: int
    doomed: list[Segment]


class DiskIndex:
    """The segments of one folder. Raises StartError if the budget is too small to work with."""

    def __init__(self, budget_bytes: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._budget_bytes = budget_bytes - _OTHER_BYTES
        record_bytes = record_offset(1, block_bytes) - record_offset(0, block_bytes)
        wanted_bytes = min(_SEGMENT_BYTES, self._budget_bytes // _SEGMENT_SHARE)
        self.records_per_segment = max(_FEWEST_RECORDS, wanted_bytes // record_bytes)
        least = _FEWEST_SEGMENTS * record_offset(_FEWEST_RECORDS, block_bytes) + _OTHER_BYTES
        if budget_bytes < least:
            raise StartError(
                f"the disk tier has {budget_bytes} bytes but needs at least {least} for "
                f"blocks of {block_bytes} bytes"
            )
        segment_bytes = record_offset(self.records_per_segment, block_bytes)
        self._num_safe = self._budget_bytes / segment_bytes * _SAFE_SHARE
        self._segments: list[Segment] = []  # in the order in which they go
        self._places: dict[bytes, Place] = {}
        self._current: Segment | None = None

    @property
    def num_safe(self) -> int:
        """So many of the blocks that were stored last are sure to be safe."""
        return max(1, int(self._num_safe) - 1) * self.records_per_segment

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found."""
        return len(self._places)

    @property
    def num_segments(self) -> int:
        """Files, also those that only take room."""
        return len(self._segments)

    @property
    def num_bytes(self) -> int:
        """At most so many bytes are on the disk."""
        return sum(segment.num_bytes for segment in self._segments)

    def get(self, key: bytes) -> Place | None:
        """Where the block is, None if it is not here."""
        return self._places.get(key)

    def is_safe(self, key: bytes) -> bool:
        """Whether the block is here and not in one of the segments that go next."""
        place = self._places.get(key)
        if place is None:
            return False
        age = self._segments[-1].number - place.segment.number
        return age < self._num_safe

    def restore(self, segments: Iterable[Segment]) -> None:
        """Take over what a folder holds; the later of two blocks with one key is the one."""
        found = sorted(segments, key=lambda segment: (segment.stamp is not None, segment.number))
        for segment in found:
            keys, segment.keys = segment.keys, {}
            self._segments.append(segment)
            for slot, key in keys.items():
                self._point(key, Place(segment, slot))

    def plan(self, num_records: int, new_stamp: int) -> Write:
        """Where the next records go; a new segment takes the stamp. As of now the room for them
        counts as used, and what must go for it cannot be found any more."""
        segment = self._current
        if segment is None or segment.num_records == self.records_per_segment:
            last = max((segment.number for segment in self._segments), default=0)
            segment = self._current = Segment(last + 1, new_stamp, 0)
            self._segments.append(segment)
        first_slot = segment.num_records
        count = min(num_records, self.records_per_segment - first_slot)
        # After a write that failed, more may be there than has been counted as written.
        num_bytes = max(segment.num_bytes, record_offset(first_slot + count, self.block_bytes))
        segment.num_bytes = num_bytes
        return Write(segment, first_slot, count, self.doomed())

    def doomed(self) -> list[Segment]:
        """The segments that must be removed to keep to the budget; their blocks are here no more.
        They count until they are `removed`."""
        excess = self.num_bytes - self._budget_bytes
        doomed = []
        for segment in self._segments:
            if excess <= 0:
                break
            assert segment is not self._current
            doomed.append(segment)
            excess -= segment.num_bytes
            for key in segment.keys.values():
                del self._places[key]
            segment.keys.clear()
        return doomed

    def removed(self, doomed: Iterable[Segment]) -> None:
        """The files of these segments are gone."""
        for segment in doomed:
            self._segments.remove(segment)

    def written(self, write: Write, keys: Sequence[bytes]) -> None:
        """The write has succeeded, with blocks of these keys."""
        self.removed(write.doomed)
        for slot, key in enumerate(keys, write.first_slot):
            self._point(key, Place(write.segment, slot))
        write.segment.num_records += len(keys)

    def forget(self, key: bytes, place: Place) -> None:
        """The block in this place cannot be used. It may be in another by now."""
        if self._places.get(key) == place:
            del self._places[key]
            del place.segment.keys[place.slot]

    def forget_all(self) -> None:
        """No block can be found any more; the files go in their turn."""
        self._places.clear()
        for segment in self._segments:
            segment.keys.clear()

    def _point(self, key: bytes, place: Place) -> None:
        former = self._places.get(key)
        if former is not None:
            self.forget(key, former)
        self._places[key] = place
        place.segment.keys[place.slot] = key
