"""The last stage of a block's way into and out of a device's memory, behind whatever mover brings
it to this host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.engine.work import DeviceMemory
from common.messages import WorkerCounts
from common.worker.mover import Mover
from common.worker.sequence import Piece


class DeviceMover:
    """Copies between a store's memory on the host, where `mover` moves blocks, and the device.

    Blocks cross beside the steps: they are committed once they have, and a sequence joins the batch
    once its blocks have. `first_slot` is where the store's blocks begin in the engine's memory.
    """

    moves = True

    def __init__(
        self,
        mover: Mover,
        device: DeviceMemory,
        first_slot: int,
        block_bytes: int,
        counts: WorkerCounts,
    ) -> None:
        self._counts = counts
        self._mover = mover
        self._device = device
        self._first_slot = first_slot
        self._block_bytes = block_bytes
        self._num_blocks_crossed = 0

    @property
    def num_bytes_moved(self) -> int:
        """By both stages."""
        return self._mover.num_bytes_moved + self._num_blocks_crossed * self._block_bytes

    def learn(self, blocks: Sequence[int], stamps: Sequence[int]) -> None:
        """See Mover."""
        self._mover.learn(blocks, stamps)

    def forget(self, blocks: Sequence[int]) -> None:
        """See Mover."""
        self._device.forget([self._first_slot + block for block in blocks])

    async def push(self, handoff_id: str, epoch: int, pieces: Sequence[Piece]) -> None:
        """See Mover."""
        await self._device.save(self._named(pieces))
        self._num_blocks_crossed += len(pieces)
        await self._mover.push(handoff_id, epoch, pieces)

    async def pull(
        self,
        handoff_id: str,
        epoch: int,
        pieces: Sequence[Piece],
        is_wanted: Callable[[], bool],
    ) -> int:
        """See Mover. What is no longer wanted is fetched in vain: a fetch that others have
        overtaken leaves no trace."""
        await self._mover.pull(handoff_id, epoch, pieces, is_wanted)
        fetched = await self._device.fetch(self._named(pieces))
        self._counts.num_device_blocks += fetched.num_blocks
        self._counts.num_neighbour_blocks += fetched.num_from_neighbours
        self._num_blocks_crossed += len(pieces)
        return len(pieces)

    def _named(self, pieces: Sequence[Piece]) -> dict[int, bytes]:
        """Slots, and the keys of those that are final."""
        return {
            self._first_slot + piece.block: piece.key if piece.is_own_key else b""
            for piece in pieces
        }
