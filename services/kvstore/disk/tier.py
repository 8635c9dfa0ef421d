"""The disk tier: blocks evicted from memory, kept in segment files under a budget of bytes.

It is a cache: whatever happens to the disk, blocks are found or they are not, and what is returned
is what was stored. Index, format, costs and the work on files are in files of their own; here are
their order, the failures and the counts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeVar

import structlog

from common.seams import Clock, Files, Rng
from services.kvstore.blocks import BlockName
from services.kvstore.disk.cost import LoadCost
from services.kvstore.disk.index import DiskIndex
from services.kvstore.disk.records import Failure, SegmentFiles

log = structlog.get_logger()

T = TypeVar("T")

_PAUSE_S = 5.0  # from a failed write to the next try
_CHUNK_BYTES = 16 << 20  # work on a disk cannot be interrupted: a cancelled load waits for so much


class DiskTier:
    """Blocks of one model and layout in one folder, which no other process may use.

    `fingerprint` names all that must be equal for a block to be usable: model, dtype and layout.
    Raises StartError if the budget is too small for blocks of this size.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        *,
        budget_bytes: int,
        block_bytes: int,
        fingerprint: str,
        clock: Clock,
        rng: Rng,
    ) -> None:
        self._files = files
        self._folder = folder
        self._clock = clock
        self._rng = rng
        self._index = DiskIndex(budget_bytes, block_bytes)
        self._segments = SegmentFiles(files, folder, block_bytes, fingerprint)
        self._block_bytes = block_bytes
        self._cost = LoadCost()
        self._counts: Counter[str] = Counter()
        self._is_scanned = False
        self._is_failing = False
        self._retry_at = 0.0
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Lock the folder and find out what it holds. Raises StartError if it cannot be had; a disk
        that fails is tried again when something is to be stored."""
        await self._files.run(partial(self._files.lock_folder, self._folder))
        async with self._writing:
            await self._try_scan()

    # ---- asking -------------------------------------------------------------------------------

    def __contains__(self, key: bytes) -> bool:
        return self._index.get(key) is not None

    def forget(self, key: bytes) -> None:
        """Nobody shall find the block of this key any more."""
        place = self._index.get(key)
        if place is not None:
            self._index.forget(key, place)

    def forget_all(self) -> None:
        """Nobody shall find any block any more, until a restart finds the files again."""
        self._index.forget_all()

    @property
    def num_safe(self) -> int:
        """So many of the blocks that were stored last are sure to be safe."""
        return self._index.num_safe

    def is_safe(self, key: bytes) -> bool:
        """Whether storing the block would write nothing: it is here and will not go soon."""
        return self._index.is_safe(key)

    @property
    def is_paused(self) -> bool:
        """Whether `store` would refuse without trying, as a write has failed just now."""
        return self._is_failing and self._clock.now() < self._retry_at

    def is_worth_loading(
        self, num_blocks: int, block_size: int, prefill_tokens_per_s: float
    ) -> bool:
        """Whether so many blocks of `block_size` tokens are sooner loaded than computed. What is
        not known is found out by loading; a prefill rate of 0 means unknown."""
        load_s = self._cost.seconds_for(num_blocks * self._block_bytes, self._clock.now())
        if load_s is None or prefill_tokens_per_s <= 0:
            return True
        return load_s < num_blocks * block_size / prefill_tokens_per_s

    @property
    def num_corrupt(self) -> int:
        """Blocks whose bytes on the disk did not fit their digest."""
        return self._counts["blocks_corrupt"]

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how things stand."""
        counted = (
            "blocks_written", "blocks_loaded", "blocks_removed", "blocks_corrupt",
            "blocks_unreadable", "segments_removed", "write_errors",
        )  # fmt: skip
        return {name: self._counts[name] for name in counted} | {
            "num_blocks": self._index.num_blocks,
            "num_segments": self._index.num_segments,
            "bytes": self._index.num_bytes,
            "read_bytes_per_s": self._cost.bytes_per_s,
            "is_failing": self._is_failing,
        }

    # ---- loading ------------------------------------------------------------------------------

    async def load(self, entries: Sequence[tuple[bytes, memoryview]]) -> list[BlockName | None]:
        """Read each key's block into the memory given; None where it is not here or is damaged:
        then the memory holds anything. The memory is used until this returns or raises, also when
        it is cancelled."""
        names: list[BlockName | None] = []
        for chunk in self._chunks(entries):
            names += await self._load_chunk(chunk)
        return names

    async def _load_chunk(
        self, entries: Sequence[tuple[bytes, memoryview]]
    ) -> list[BlockName | None]:
        names: list[BlockName | None] = [None] * len(entries)
        requests = {
            position: (key, place, memory)
            for position, (key, memory) in enumerate(entries)
            if (place := self._index.get(key)) is not None
        }
        if not requests:
            return names
        started_at = self._clock.now()
        results = await self._files.run(partial(self._segments.read, list(requests.values())))
        now = self._clock.now()
        failures: Counter[str] = Counter()
        for (position, (key, place, _)), result in zip(requests.items(), results, strict=True):
            if isinstance(result, BlockName):
                names[position] = result
            else:
                self._index.forget(key, place)
                failures[result.value] += 1
        num_loaded = len(requests) - failures.total()
        if num_loaded:
            self._cost.observe(num_loaded * self._block_bytes, now - started_at, now)
        if failures[Failure.CORRUPT.value] or failures[Failure.UNREADABLE.value]:
            log.warning("disk_blocks_dropped", folder=self._folder, **failures)
        self._counts["blocks_loaded"] += num_loaded
        self._counts.update({f"blocks_{reason}": count for reason, count in failures.items()})
        return names

    # ---- storing ------------------------------------------------------------------------------

    async def store(self, entries: Sequence[tuple[BlockName, memoryview]]) -> bool:
        """Append blocks that are not here yet; returns when the operating system has them.

        False if it could not: then part of them may be here. The memory is read until this returns
        or raises, also when it is cancelled.
        """
        async with self._writing:
            if self.is_paused or not (self._is_scanned or await self._try_scan()):
                return False
            new = {name.key: (name, memory) for name, memory in entries}
            wanted = [entry for key, entry in new.items() if not self._index.is_safe(key)]
            for chunk in self._chunks(wanted):
                if not await self._store_chunk(chunk):
                    return False
            return True

    async def _store_chunk(self, entries: Sequence[tuple[BlockName, memoryview]]) -> bool:
        while entries:
            write = self._index.plan(len(entries), self._rng.new_seed())
            batch, entries = entries[: write.num_records], entries[write.num_records :]
            try:
                await self._files.run(partial(self._segments.write, write, batch))
            except OSError as error:
                self._fails(error)
                return False
            self._index.written(write, [name.key for name, _ in batch])
            self._counts["blocks_written"] += len(batch)
            self._counts["segments_removed"] += len(write.doomed)
            self._works()
        return True

    async def _try_scan(self) -> bool:
        try:
            sizes = await self._files.run(self._segments.list_segments)
            found = [
                await self._files.run(partial(self._segments.scan, number, num_bytes))
                for number, num_bytes in sorted(sizes.items())
            ]
            self._index.restore(found)
            self._is_scanned = True
            doomed = self._index.doomed()
            await self._files.run(partial(self._segments.remove, doomed))
            self._index.removed(doomed)
        except OSError as error:
            self._fails(error)
            return self._is_scanned
        unusable = sum(segment.stamp is None for segment in found)
        blocks, num_bytes = self._index.num_blocks, self._index.num_bytes
        log.info("disk_tier_opened", blocks=blocks, bytes=num_bytes, unusable_segments=unusable)
        return True

    def _fails(self, error: OSError) -> None:
        self._counts["write_errors"] += 1
        self._retry_at = self._clock.now() + _PAUSE_S
        if not self._is_failing:
            self._is_failing = True
            log.warning("disk_tier_fails", folder=self._folder, reason=str(error))

    def _works(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.info("disk_tier_works_again", folder=self._folder)

    def _chunks(self, entries: Sequence[T]) -> Iterator[Sequence[T]]:
        count = max(1, _CHUNK_BYTES // self._block_bytes)
        for start in range(0, len(entries), count):
            yield entries[start : start + count]
