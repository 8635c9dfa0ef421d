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

    async def pull(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        """Make final blocks readable here."""


class ShmMover:
    """Both sides map the same file: there is nothing to do."""

    moves = False
    num_bytes_moved = 0

    async def push(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        """Nothing moves."""

    async def pull(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
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
        await self._in_batches(self._push_batch, handoff_id, epoch, blocks)

    async def pull(self, handoff_id: str, epoch: int, blocks: Sequence[int]) -> None:
        await self._in_batches(self._pull_batch, handoff_id, epoch, blocks)

    async def _in_batches(
        self,
        move: Callable[[str, int, list[int]], Awaitable[None]],
        handoff_id: str,
        epoch: int,
        blocks: Sequence[int],
    ) -> None:
        batches = [blocks[i : i + self._batch] for i in range(0, len(blocks), self._batch)]
        await asyncio.gather(*(move(handoff_id, epoch, list(batch)) for batch in batches))

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]

    async def _push_batch(self, handoff_id: str, epoch: int, blocks: list[int]) -> None:
        async with self._credits:
            message = PutBlocks(handoff_id=handoff_id, epoch=epoch, blocks=blocks)
            await self._link.call(message, [self._bytes(block) for block in blocks])
            self.num_bytes_moved += len(blocks) * self._block_bytes

    async def _pull_batch(self, handoff_id: str, epoch: int, blocks: list[int]) -> None:
        async with self._credits:
            message = GetBlocks(handoff_id=handoff_id, epoch=epoch, blocks=blocks)
            answer, frames = await self._link.call_bulk(message)
            assert isinstance(answer, BlockBytes)
            for block, frame in zip(blocks, frames, strict=True):
                self._bytes(block)[:] = frame
            self.num_bytes_moved += len(blocks) * self._block_bytes
