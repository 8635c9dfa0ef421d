"""Movers make blocks of the store's arena usable where a worker computes.

`shm`: the worker maps the very arena; nothing moves. `zmq`: the worker computes in memory of its
own and block bytes travel as frames (block_wire.py), each with a digest. `nixl`: as zmq, but the
store fetches and brings the bytes by itself (nixl_wire.py). A block has the same number everywhere,
and so a block table the same meaning; what is held here is not pulled again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from common.kv.integrity import block_digest
from common.messages import CorruptError, GetBlocks, PutBlocks, StaleError
from common.net.nixl import PIECE_BYTES
from common.seams import Clock
from common.transfer_rate import TransferRate
from common.worker.block_wire import BlockWire, Frames
from common.worker.moving import Moving
from common.worker.sequence import Piece
from kvbaton.errors import KvbatonError

BYTES_IN_FLIGHT = 8 * 1024 * 1024  # each way: what may be on its way before an answer came
MESSAGE_BYTES = PIECE_BYTES  # a message's share, small so that neither end's loop stalls on it


class CorruptPiecesError(CorruptError):
    """Pieces came with bytes that do not fit their digests."""

    def __init__(self, indexes: list[int]) -> None:
        super().__init__(f"blocks at {indexes} of the table do not fit their digests")
        self.indexes = indexes


class Mover(Protocol):
    """How blocks come and go."""

    moves: bool

    @property
    def num_bytes_moved(self) -> int:
        """Both ways, since it began."""

    def learn(self, blocks: Sequence[int], stamps: Sequence[int]) -> None:
        """The store said what these blocks are now."""

    def forget(self, blocks: Sequence[int]) -> None:
        """What was written of these here and not pushed will not be."""

    async def push(self, handoff_id: str, epoch: int, pieces: Sequence[Piece], /) -> None:
        """Make consecutive blocks that were written here readable elsewhere."""

    async def pull(
        self,
        handoff_id: str,
        epoch: int,
        pieces: Sequence[Piece],
        is_wanted: Callable[[], bool],
        /,
    ) -> int:
        """Make final blocks readable here, while they are wanted: nothing is written after that.
        Returns how many had to be moved. Raises CorruptPiecesError."""


class ShmMover:
    """Both sides map the same file: there is nothing to do."""

    moves = False
    num_bytes_moved = 0

    def learn(self, blocks: Sequence[int], stamps: Sequence[int]) -> None:
        """There are no copies."""

    def forget(self, blocks: Sequence[int]) -> None:
        """There are no copies."""

    async def push(self, *_: object) -> None:
        """Nothing moves."""

    async def pull(self, *_: object) -> int:
        """Nothing moves."""
        return 0


class ZmqMover:
    """Bytes as frames over the connections to a store's data socket, bounded by byte credits.

    `arena` is this worker's memory for the blocks of that store.
    """

    moves = True

    def __init__(
        self,
        wire: BlockWire,
        arena: memoryview,
        block_bytes: int,
        moving: Moving,
        clock: Clock,
    ) -> None:
        self._wire = wire
        self._arena = arena
        self._block_bytes = block_bytes
        self._moving = moving
        self._clock = clock
        self._batch = max(1, MESSAGE_BYTES // block_bytes)
        self._credits = asyncio.Semaphore(max(1, BYTES_IN_FLIGHT // (self._batch * block_bytes)))
        self._stamps: dict[int, int] = {}  # what each block is, as far as we were told
        self._held: dict[int, int] = {}  # which stamp's bytes our copy of a block has
        self.num_bytes_moved = 0

    def learn(self, blocks: Sequence[int], stamps: Sequence[int]) -> None:
        self._stamps.update(zip(blocks, stamps, strict=True))

    def forget(self, blocks: Sequence[int]) -> None:
        """What is held is known by its stamp."""

    async def push(self, handoff_id: str, epoch: int, pieces: Sequence[Piece]) -> None:
        async def push_batch(batch: Sequence[Piece]) -> None:
            stamps = [self._stamp(piece.block) for piece in batch]
            frames = [self._bytes(piece.block) for piece in batch]
            message = PutBlocks(
                handoff_id=handoff_id,
                epoch=epoch,
                first_index=batch[0].place,
                blocks=[piece.block for piece in batch],
                digests=[],
                keys=[piece.key for piece in batch],
            )

            def digests(blocks: Frames) -> list[bytes]:
                named = zip(batch, stamps, blocks, strict=True)
                return [block_digest(piece.key, stamp, block) for piece, stamp, block in named]

            await self._wire.put(message, frames, digests)
            self._held.update((piece.block, s) for piece, s in zip(batch, stamps, strict=True))

        await self._in_batches(push_batch, pieces, self._moving.pushes.blocks)

    async def pull(
        self,
        handoff_id: str,
        epoch: int,
        pieces: Sequence[Piece],
        is_wanted: Callable[[], bool],
    ) -> int:
        num_pulled = 0

        async def pull_batch(batch: Sequence[Piece]) -> None:
            nonlocal num_pulled
            indexes = [piece.place for piece in batch]
            message = GetBlocks(handoff_id=handoff_id, epoch=epoch, indexes=indexes)
            stamps = [self._stamp(piece.block) for piece in batch]
            digests, frames = await self._wire.get(message)
            self._take(batch, stamps, digests, frames, is_wanted)
            num_pulled += len(batch)

        missing = [p for p in pieces if self._held.get(p.block) != self._stamp(p.block)]
        await self._in_batches(pull_batch, missing, self._moving.pulls.blocks)
        return num_pulled

    def _stamp(self, block: int) -> int:
        stamp = self._stamps.get(block)
        if stamp is None:
            raise StaleError("the block was granted before the store was joined anew")
        return stamp

    def _take(
        self,
        batch: Sequence[Piece],
        stamps: list[int],
        digests: list[bytes],
        frames: Frames,
        is_wanted: Callable[[], bool],
    ) -> None:
        corrupt: list[int] = []
        for piece, stamp, digest, frame in zip(batch, stamps, digests, frames, strict=True):
            if block_digest(piece.key, stamp, frame) != digest:
                corrupt.append(piece.place)
            elif is_wanted():
                self._bytes(piece.block)[:] = frame
                self._held[piece.block] = stamp
        if corrupt:
            raise CorruptPiecesError(corrupt)

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]

    async def _in_batches(
        self,
        move: Callable[[Sequence[Piece]], Awaitable[None]],
        pieces: Sequence[Piece],
        rate: TransferRate,
    ) -> None:
        """Move blocks in messages of bounded size, with bounded bytes under way. All have ended
        when this does, also when one has failed: nothing reads or writes memory after that."""
        counts, clock = self._moving.counts, self._clock

        async def move_batch(batch: Sequence[Piece]) -> None:
            async with self._credits:
                started_at = clock.now()
                rate.begin(started_at)
                num_bytes = 0
                try:
                    await move(batch)
                    num_bytes = len(batch) * self._block_bytes
                except KvbatonError:
                    counts.num_transfers_failed += 1
                    raise
                finally:
                    rate.end(num_bytes, clock.now())
                self.num_bytes_moved += num_bytes
                counts.transfer(num_bytes, clock.now() - started_at)

        batches = [pieces[i : i + self._batch] for i in range(0, len(pieces), self._batch)]
        moves = (move_batch(batch) for batch in batches)
        results = await asyncio.gather(*moves, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
