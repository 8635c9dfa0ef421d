"""The store's hand in workers' memory: it reads what they put there, and writes what they ask for.

Only the store begins transfers, and nobody gets a key to memory of its own: a worker that was
fenced can write nothing here. What it reads lies apart from the arena until epoch and digest are
checked, after the transfer, as of a frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.messages import OfferMemory
from common.net.nixl import Agent, Piece, Pieces
from common.service import Aside
from kvbaton.errors import ProtocolError

MOST_BYTES = 64 * 1024 * 1024  # under way, of all workers


class WorkersMemory:
    """What each worker has offered. `is_member(worker_id)`: whether it still is."""

    def __init__(self, agent: Agent, aside: Aside, is_member: Callable[[str], bool]) -> None:
        self._agent = agent
        self._aside = aside
        self._is_member = is_member
        self._offers: dict[str, OfferMemory] = {}  # by worker
        self._names: dict[bytes, str] = {}  # of agents, by their metadata
        self._pieces: Pieces | None = None
        self._block_bytes = 1
        self._accepting = asyncio.Lock()

    def serve(self, block_bytes: int) -> None:
        """Blocks of this size are to move."""
        self._pieces = Pieces(self._agent, MOST_BYTES, block_bytes)
        self._block_bytes = block_bytes

    async def accept(self, worker_id: str, offer: OfferMemory) -> None:
        """The worker's memory may be named from now on. Raises UnavailableError."""
        async with self._accepting:
            for gone in [each for each in self._offers if not self._is_member(each)]:
                del self._offers[gone]
            used = {offer.metadata, *(each.metadata for each in self._offers.values())}
            for metadata in self._names.keys() - used:
                await self._aside(self._agent.forget, self._names.pop(metadata))
            if offer.metadata not in self._names:
                self._names[offer.metadata] = await self._aside(self._agent.meet, offer.metadata)
            self._offers[worker_id] = offer

    @contextmanager
    def lent(self, num_blocks: int) -> Iterator[Piece]:
        """Memory for the blocks of one message. Raises OverloadedError, or ProtocolError."""
        assert self._pieces is not None
        if num_blocks * self._block_bytes > self._pieces.piece_bytes:
            raise ProtocolError(
                f"a message may move {self._pieces.piece_bytes} bytes in memory, "
                f"got {num_blocks} blocks of {self._block_bytes}"
            )
        with self._pieces.lent() as piece:
            yield piece

    async def read(
        self, worker_id: str, offset: int, piece: Piece, num_blocks: int
    ) -> list[memoryview]:
        """Blocks that lie there. Raises UnavailableError, or ProtocolError for a wrong place."""
        num_bytes = num_blocks * self._block_bytes
        name, there = self._find(worker_id, offset, num_bytes)
        await self._aside(self._agent.read, piece.address, name, there, num_bytes)
        return piece.blocks(num_blocks, self._block_bytes)

    async def write(
        self, worker_id: str, offset: int, piece: Piece, blocks: Sequence[bytes]
    ) -> None:
        """Put blocks there. Raises as `read`."""
        num_bytes = len(blocks) * self._block_bytes
        name, there = self._find(worker_id, offset, num_bytes)
        copies = piece.blocks(len(blocks), self._block_bytes)
        for copy, block in zip(copies, blocks, strict=True):
            copy[:] = block
        await self._aside(self._agent.write, piece.address, name, there, num_bytes)

    def close(self) -> None:
        self._agent.close()

    def _find(self, worker_id: str, offset: int, num_bytes: int) -> tuple[str, int]:
        offer = self._offers.get(worker_id)
        if offer is None or offset + num_bytes > offer.num_bytes:
            raise ProtocolError(f"{num_bytes} bytes at {offset} lie in no memory that was offered")
        return self._names[offer.metadata], offer.address + offset
