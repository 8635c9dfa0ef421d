"""A prompt's blocks through a store process, with the workers' own movers, and with less."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.kv.encodings import PLANES
from common.kv.integrity import block_digest
from common.kv.layout import KvLayout
from common.messages import (
    Claim,
    Commit,
    Fill,
    Granted,
    HandoffOpened,
    Message,
    Release,
    Seal,
    Sealed,
    WorkerCounts,
)
from common.net.link import Link
from common.net.nixl import Pieces, load_agent
from common.seams import LiveClock
from common.worker.block_wire import BlockWire
from common.worker.mover import BYTES_IN_FLIGHT, ZmqMover
from common.worker.moving import Moving
from common.worker.nixl_wire import NixlWire
from common.worker.sequence import Piece
from scripts.benchmarks.store_handoffs import open_message, random_keys
from scripts.benchmarks.store_members import StoreMembers

# The 135M model's: blocks of 368,640 bytes.
LAYOUT = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")


def random_blocks(count: int) -> memoryview:
    """Memory of so many blocks, all of it written to: numbers as different in size as those of KV,
    in each channel others."""
    memory = mmap.mmap(-1, count * LAYOUT.block_bytes)
    random = np.random.default_rng(1)
    scales = np.exp(random.normal(size=LAYOUT.head_dim))
    shape = LAYOUT.block_bytes // 2 // LAYOUT.head_dim, LAYOUT.head_dim
    numbers = (random.normal(size=shape) * scales).astype(np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).ravel()
    np.frombuffer(memory, np.uint16).reshape(count, -1)[:] = block
    return memoryview(memory)


def block_of(memory: memoryview, number: int) -> memoryview:
    """One block's bytes."""
    return memory[number * LAYOUT.block_bytes : (number + 1) * LAYOUT.block_bytes]


class MovedPrompt:
    """A handoff whose blocks go from prefill's memory to the store's, and on to decode's; one can
    follow another. The blocks of the last one lie in the store's `arena` as cache."""

    def __init__(
        self,
        members: StoreMembers,
        num_blocks: int,
        num_connections: int = 1,
        compression: str = "off",
        nixl_devices: str = "",
    ) -> None:
        self._members = members
        self._num_blocks = num_blocks
        self._num_connections = num_connections
        self._compression = compression
        self._nixl_devices = nixl_devices
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        members.pushed = self._told.put_nowait
        self._handoff: tuple[str, int] = "", 0
        self._pieces: list[Piece] = []
        self.blocks: list[int] = []
        self.arena = memoryview(b"")

    async def join(self) -> None:
        """Connect to the store's data socket, and map its arena as a worker of its host would."""
        welcome = await self._members.join()
        self.arena = _map(welcome.arena_path)
        self._prefill, self._decode = [
            await self._mover(role, welcome.num_blocks) for role in ("prefill", "decode")
        ]

    async def _mover(self, role: str, num_blocks: int) -> ZmqMover:
        links = [await self._members.data_link(role) for _ in range(self._num_connections)]
        moving, clock = Moving(WorkerCounts(), compression=self._compression), LiveClock()
        if self._nixl_devices:
            wire: BlockWire = await self._nixl_wire(role, links, moving)
        else:
            wire = BlockWire(links, LAYOUT, moving, clock, asyncio.to_thread)
        wire.encodings = [PLANES]
        return ZmqMover(wire, random_blocks(num_blocks), LAYOUT.block_bytes, moving, clock)

    async def _nixl_wire(self, role: str, links: Sequence[Link], moving: Moving) -> NixlWire:
        agent = load_agent(self._members.ids[role], self._nixl_devices)
        memory = Pieces(agent, 2 * BYTES_IN_FLIGHT, LAYOUT.block_bytes)
        loop = asyncio.get_running_loop()

        def spawn(work: Coroutine[Any, Any, None], name: str) -> object:
            return loop.create_task(work, name=name)

        wire = NixlWire(
            links, LAYOUT, moving, LiveClock(), asyncio.to_thread, memory=memory, spawn=spawn
        )
        await wire.offer()
        assert wire.is_accepted
        return wire

    async def fill(self) -> None:
        """Have blocks to write."""
        gateway, prefill, _ = self._members.links.values()
        keys = random_keys(self._num_blocks)
        num_tokens = self._num_blocks * LAYOUT.block_size
        opened = await gateway.call(open_message(keys, num_tokens, self._members.ids))
        assert isinstance(opened, HandoffOpened)
        handoff_id, epoch = self._handoff = opened.handoff_id, opened.epoch
        granted = await prefill.call(Fill(handoff_id=handoff_id, epoch=epoch))
        assert isinstance(granted, Granted)
        self.blocks = granted.blocks
        self._prefill.learn(granted.blocks, granted.stamps)
        named = zip(granted.blocks, keys, strict=True)
        self._pieces = [Piece(place, block, key, True) for place, (block, key) in enumerate(named)]

    async def push(self) -> None:
        """The bytes go to the store."""
        await self._prefill.push(*self._handoff, self._pieces)

    async def claim(self) -> None:
        """Prefill hands over to decode."""
        _, prefill, decode = self._members.links.values()
        handoff_id, epoch = self._handoff
        prefill.send(Commit(handoff_id=handoff_id, epoch=epoch, first_index=0, blocks=self.blocks))
        prefill.send(Seal(handoff_id=handoff_id, epoch=epoch, first_token=1))
        while not isinstance(await self._told.get(), Sealed):
            pass  # filled: what it names is pulled later
        claimed = await decode.call(Claim(handoff_id=handoff_id, epoch=epoch))
        assert isinstance(claimed, Granted)
        self._decode.learn(claimed.blocks, claimed.stamps)

    async def pull(self) -> None:
        """The bytes come from the store; then decode is done."""
        num_moved = await self._decode.pull(*self._handoff, self._pieces, lambda: True)
        assert num_moved == len(self._pieces)
        handoff_id, epoch = self._handoff
        self._members.links["decode"].send(Release(handoff_id=handoff_id, epoch=epoch))


def _map(path: str) -> memoryview:
    with Path(path).open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0))


def copy(source: memoryview, target: memoryview, blocks: Sequence[int]) -> None:
    """A plain copy in memory."""
    for block in blocks:
        block_of(target, block)[:] = block_of(source, block)


def read(arena: memoryview, blocks: Sequence[int]) -> int:
    """Add up all numbers of the blocks."""
    return sum(int(np.frombuffer(block_of(arena, block), np.uint64).sum()) for block in blocks)


def digest(arena: memoryview, blocks: Sequence[int]) -> None:
    """The digest of each block."""
    for block in blocks:
        block_digest(b"key", block, block_of(arena, block))
