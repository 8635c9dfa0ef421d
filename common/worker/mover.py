"""Movers make blocks of the store's arena usable where a worker computes.

`shm`: the worker maps the very arena; nothing moves. `zmq`: the worker computes in memory of its
own and block bytes travel as frames. A block has the same number in both, so a block table means
the same everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from common.messages import BlockBytes, GetBlocks, PutBlocks
from common.net.link import Link

BYTES_IN_FLIGHT = 8 * 1024 * 1024  # each way: what may be on its way before an answer came
MESSAGE_BYTES = 1024 * 1024  # a message's share, small so that neither end's loop stalls on it


class Mover(Protocol):
    """How blocks come and go. `num_bytes_moved` counts KV bytes, both ways."""

    moves: bool
    num_bytes_moved: int

    async def push(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        """Make blocks that were written here readable elsewhere."""

    async def pull(
        self, handoff_id: str, epoch: int, blocks: Sequence[int], is_wanted: Callable[[], bool]
    ) -> None:
        """Make final blocks readable here, while they are wanted: nothing is written after that."""


class ShmMover:
    """Both sides map the same file: there is nothing to do."""

    moves = False
    num_bytes_moved = 0

    async def push(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        """Nothing moves."""

    async def pull(
        self, handoff_id: str, epoch: int, blocks: Sequence[int], is_wanted: Callable[[], bool]
    ) -> None:
        """Nothing moves."""


class ZmqMover:
    """Bytes as frames over the store's data socket, bounded by byte credits.

    `arena` is this worker's memory, `first` the store's first block in it.
    """

    moves = True

    def __init__(self, link: Link, arena: memoryview, block_bytes: int) -> None:
        self._link = link
        self._arena = arena
        self._block_bytes = block_bytes
        self._batch = max(1, MESSAGE_BYTES // block_bytes)
        self._credits = asyncio.Semaphore(max(1, BYTES_IN_FLIGHT // (self._batch * block_bytes)))
        self.num_bytes_moved = 0

    async def push(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        async def push_batch(batch: list[int]) -> None:
            message = PutBlocks(handoff_id=handoff_id, epoch=epoch, blocks=batch)
            await self._link.call(message, [self._bytes(block) for block in batch])

        await self._in_batches(push_batch, blocks)

    async def pull(
        self, handoff_id: str, epoch: int, blocks: Sequence[int], is_wanted: Callable[[], bool]
    ) -> None:
        async def pull_batch(batch: list[int]) -> None:
            message = GetBlocks(handoff_id=handoff_id, epoch=epoch, blocks=batch)
            answer, frames = await self._link.call_bulk(message)
            assert isinstance(answer, BlockBytes)
            if is_wanted():
                for block, frame in zip(batch, frames, strict=True):
                    self._bytes(block)[:] = frame

        await self._in_batches(pull_batch, blocks)

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]

    async def _in_batches(
        self, move: Callable[[list[int]], Awaitable[None]], blocks: Sequence[int]
    ) -> None:
        """Move blocks in messages of bounded size, with bounded bytes under way. All have ended
        when this does, also when one has failed: nothing reads or writes memory after that."""

        async def move_batch(batch: list[int]) -> None:
            async with self._credits:
                await move(batch)
                self.num_bytes_moved += len(batch) * self._block_bytes

        batches = [list(blocks[i : i + self._batch]) for i in range(0, len(blocks), self._batch)]
        moves = (move_batch(batch) for batch in batches)
        results = await asyncio.gather(*moves, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
