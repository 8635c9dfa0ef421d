"""The mock engine with memory of its own, as on a GPU: what is not fetched, saved or forgotten in
time shows as a wrong token, or as a pool that fills up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from common.engine.cuda.copies import address_of
from common.engine.cuda.residency import (
    NAME_WORDS,
    Copies,
    PoolFullError,
    Residency,
    Step,
    words_of,
)
from common.engine.mock import MOCK_LAYOUT, MockEngine
from common.engine.work import Fetched, Sampled, Work

_SIZE = MOCK_LAYOUT.block_size
_COPY_S = 0.002


class MockDevice:
    """Implements work.DeviceMemory; copies take time, and bytes cross at the end of it.

    `neighbours` are all devices of one GPU, whose memory each of their workers can read."""

    def __init__(
        self, arena: memoryview, num_blocks: int, neighbours: list[MockDevice] | None = None
    ) -> None:
        self.arena = np.frombuffer(arena, dtype=np.uint64).reshape(
            len(arena) // MOCK_LAYOUT.block_bytes, -1
        )
        self.residency = Residency(len(self.arena), num_blocks + 1)
        self.pool = np.full((num_blocks + 1, self.arena.shape[1]), 2**63 + 1, dtype=np.uint64)
        self._memory = arena
        self._num_replaced = 0
        self._copying = asyncio.Lock()
        self.neighbours = [] if neighbours is None else neighbours
        self.neighbours.append(self)
        self.num_from_neighbours = 0
        self.num_lost = 0  # blocks that changed while they were copied

    async def begin_step(self, works: Sequence[Work]) -> Step:
        used = [-(-work.end // _SIZE) for work in works]
        tables = np.zeros((len(works), max(used)), dtype=np.int32)
        for row, work, count in zip(tables, works, used, strict=True):
            row[:count] = work.slots[:count]
        starts = np.array([work.start for work in works])
        ends = starts + [work.num_tokens for work in works]
        try:
            step = self.residency.begin_step(tables, starts, ends, _SIZE)
        except PoolFullError:
            async with self._copying:
                copies = self.residency.begin_save(self.residency.unsaved())
                self.arena[copies.slots] = self.pool[copies.blocks]
                self.residency.end_save(copies)
                step = self.residency.begin_step(tables, starts, ends, _SIZE)
        self._copy_in(step.loads)
        return step

    def _copy_in(self, copies: Copies) -> None:
        self.pool[copies.blocks] = self.arena[copies.slots]

    async def fetch(self, named: Mapping[int, bytes]) -> Fetched:
        async with self._copying:
            copies = self.residency.begin_fetch(list(named))
            await asyncio.sleep(_COPY_S)
            self._copy_in(copies)
            verified = {
                slot: named[slot]
                for slot, block in zip(copies.slots.tolist(), copies.blocks.tolist(), strict=True)
                if await self._copy_across(block, named[slot])
            }
            self.residency.end_fetch(copies, verified)
        self.num_from_neighbours += len(verified)
        return Fetched(len(copies.slots), len(verified))

    async def _copy_across(self, block: int, name: bytes) -> bool:
        """As neighbours.py does: copy, and then look whether that was still the block."""
        for other in self.neighbours if name else ():
            for theirs in range(len(other.pool)) if other is not self else ():
                if other.is_named(theirs, name):
                    names = other.residency.names[:, theirs].copy()
                    await asyncio.sleep(_COPY_S)
                    copied = other.pool[theirs].copy()
                    if not np.array_equal(names, other.residency.names[:, theirs]):
                        self.num_lost += 1
                        return False
                    self.pool[block] = copied
                    return True
        return False

    def is_named(self, block: int, name: bytes) -> bool:
        return bool(np.all(self.residency.names[:NAME_WORDS, block] == words_of(name)))

    async def save(self, named: Mapping[int, bytes]) -> None:
        marked = self.residency.marked(named)
        async with self._copying:
            copies, num_replaced = self.residency.begin_save(list(named)), self._num_replaced
            await asyncio.sleep(_COPY_S)
            if num_replaced == self._num_replaced:
                self.arena[copies.slots] = self.pool[copies.blocks]
            self.residency.end_save(copies, marked)

    def forget(self, slots: Sequence[int]) -> None:
        self.residency.forget(slots)

    @contextmanager
    def replacing(self, place: memoryview) -> Iterator[None]:
        """The real one waits for the copy under way. To this one it is as if it had ended."""
        self._num_replaced += 1
        first = (address_of(place) - address_of(self._memory)) // MOCK_LAYOUT.block_bytes
        self.residency.clear(first, len(place) // MOCK_LAYOUT.block_bytes)
        yield


class DeviceMockEngine(MockEngine):
    """Computes in a MockDevice of `num_blocks`, 0 for as many as the arena has; it joins the
    `neighbours`."""

    def __init__(
        self,
        step_s: float,
        token_s: float,
        num_blocks: int = 0,
        neighbours: list[MockDevice] | None = None,
    ) -> None:
        super().__init__(step_s, token_s)
        self.device: MockDevice | None = None
        self._num_blocks = num_blocks
        self._neighbours = neighbours

    def attach(self, arena: memoryview) -> None:
        count = self._num_blocks or len(arena) // MOCK_LAYOUT.block_bytes
        self.device = self.device_memory = MockDevice(arena, count, self._neighbours)
        self._kv = self.device.pool.reshape(count + 1, _SIZE, -1)

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        assert self.device is not None
        try:
            step = await self.device.begin_step(works)
        except PoolFullError:
            if len(works) == 1:
                raise
            half = len(works) // 2
            return await self.step(works[:half]) + await self.step(works[half:])
        try:
            located = [
                replace(work, slots=table)
                for work, table in zip(works, step.tables.tolist(), strict=True)
            ]
            results = await super().step(located)
        finally:
            self.device.residency.end_step(step)
        for work, there in zip(works, located, strict=True):
            work.scores = there.scores
        return results
