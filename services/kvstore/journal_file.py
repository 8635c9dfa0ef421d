"""The journal in its memory: a header, the workers that map the arena, a word and a record of each
block. What the bytes mean is journal.py."""

from __future__ import annotations

from typing import NamedTuple

from kvbaton.errors import OverloadedError
from services.kvstore.blocks import Block, BlockState
from services.kvstore.journal import (
    FREE,
    HEADER_BYTES,
    IN_USE,
    RECORD_BYTES,
    UNUSED,
    WORKER_BYTES,
    WRITTEN,
    Header,
    JournalError,
    Recovered,
    Worker,
    pack_header,
    pack_record,
    pack_word,
    pack_worker,
    recover,
    unpack_header,
    unpack_record,
    unpack_word,
    unpack_worker,
)

_MOST_WORKERS = 256
_WORKERS_AT = 512
_WORDS_AT = _WORKERS_AT + _MOST_WORKERS * WORKER_BYTES
_WORD_BYTES = 8

assert HEADER_BYTES <= _WORKERS_AT


def journal_bytes(num_blocks: int) -> int:
    """How large the journal of an arena is."""
    return _WORDS_AT + num_blocks * (_WORD_BYTES + RECORD_BYTES)


def read_header(memory: memoryview) -> Header:
    """Of a journal that was left. Raises JournalError if it was not begun, or is damaged."""
    header = unpack_header(bytes(memory[:HEADER_BYTES]))
    if header is None or len(memory) != journal_bytes(header.num_blocks):
        raise JournalError("its journal has no header that fits it")
    return header


class Left(NamedTuple):
    """What a dead store left: its blocks, and the workers that may not know yet that it is dead."""

    recovered: Recovered
    workers: list[Worker]


class Journal:
    """Implements blocks.BlockJournal. Each write is in memory when it returns."""

    def __init__(self, memory: memoryview, num_blocks: int) -> None:
        """`memory` as large as `journal_bytes` says."""
        self._memory = memory
        self._num_blocks = num_blocks
        self._records_at = _WORDS_AT + num_blocks * _WORD_BYTES
        self._words = memory[_WORDS_AT : self._records_at].cast("Q")
        self._last_use = 0
        self._places: dict[str, int] = {}  # of workers, by member id

    def begin(self, header: Header) -> None:
        """A new journal in empty memory. Its header comes last: without it there is none."""
        for block_id in range(self._num_blocks):
            self.write(block_id, Block())
        self._memory[:HEADER_BYTES] = pack_header(header)

    def take_over(self) -> Left:
        """Go on with a journal that was left. Raises JournalError if it cannot be believed."""
        workers = []
        for place in range(_MOST_WORKERS):
            worker = unpack_worker(bytes(self._memory[self._place(place)]))
            if worker is not None:
                workers.append(worker)
                self._places[worker.member.member_id] = place
        words = [unpack_word(block_id, word) for block_id, word in enumerate(self._words)]
        self._last_use = max((word.value for word in words if word.use == UNUSED), default=0)
        records = [
            unpack_record(block_id, bytes(self._memory[self._record(block_id)]))
            for block_id in range(self._num_blocks)
        ]
        return Left(recover(words, records, list(self._places)), workers)

    # ---- blocks -------------------------------------------------------------------------------

    def write(self, block_id: int, block: Block) -> None:
        if block.name is not None:
            # Until now the word says that the block is being written.
            record = pack_record(block_id, block.stamp, block.name)
            self._memory[self._record(block_id)] = record
            self.used(block_id)
            return
        use = FREE if block.state is BlockState.FREE else WRITTEN
        self._words[block_id] = pack_word(block_id, use, block.stamp)

    def used(self, block_id: int) -> None:
        self._words[block_id] = pack_word(block_id, IN_USE, 0)

    def unused(self, block_id: int) -> None:
        self._last_use += 1
        self._words[block_id] = pack_word(block_id, UNUSED, self._last_use)

    def _record(self, block_id: int) -> slice:
        start = self._records_at + block_id * RECORD_BYTES
        return slice(start, start + RECORD_BYTES)

    # ---- workers ------------------------------------------------------------------------------

    def add_worker(self, worker: Worker) -> None:
        """A member that maps the arena, before it is told where it is. Raises OverloadedError if
        there are too many, ProtocolError if it says too much of itself."""
        member_id = worker.member.member_id
        free = set(range(_MOST_WORKERS)).difference(self._places.values())
        if member_id not in self._places and not free:
            raise OverloadedError(
                f"{_MOST_WORKERS} workers may map an arena, former ones too that may still be "
                "writing",
                retry_after_s=1,
            )
        place = self._places.get(member_id, min(free, default=0))
        self._memory[self._place(place)] = pack_worker(worker)
        self._places[member_id] = place

    def forget_worker(self, member_id: str) -> None:
        """The member has stopped; nothing to do if it is none of these."""
        place = self._places.pop(member_id, None)
        if place is not None:
            self._memory[self._place(place)] = bytes(WORKER_BYTES)

    def _place(self, place: int) -> slice:
        start = _WORKERS_AT + place * WORKER_BYTES
        return slice(start, start + WORKER_BYTES)
