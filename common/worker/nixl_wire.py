"""Block bytes between a worker and a store by NIXL: the store reads them from memory that the
worker has offered, and writes them there.

Messages and digests go over the connections as ever; what fails here goes over them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from common.config import StartError
from common.kv.layout import KvLayout
from common.messages import BlockBytes, GetBlocks, Message, OfferMemory, PutBlocks, Welcome
from common.net.link import Link
from common.net.nixl import Pieces
from common.seams import Clock
from common.service import Aside, Seams
from common.worker.block_wire import BlockWire, Frames
from common.worker.config import WorkerConfig
from common.worker.mover import BYTES_IN_FLIGHT
from common.worker.moving import Moving
from kvbaton.errors import KvbatonError, OverloadedError, ProtocolError, UnavailableError

log = structlog.get_logger()


async def make_memory(config: WorkerConfig, seams: Seams, block_bytes: int) -> Pieces:
    """What a worker offers to its stores. Raises StartError."""
    if not config.nixl_devices:
        raise StartError(
            "--mover nixl sends KV in clear, and whoever reaches its ports can read and write this "
            "process's memory: name network devices on which all are trusted with --nixl-devices, "
            "or use another mover (docs/security.md)"
        )
    if config.kv_compression != "off":
        raise StartError("--kv-compression is not for --mover nixl, which moves blocks whole")
    agent = await seams.aside(seams.nixl, seams.rng.new_id(), config.nixl_devices)
    try:
        return Pieces(agent, 2 * BYTES_IN_FLIGHT, block_bytes)
    except UnavailableError as error:
        raise StartError(f"{error.message}: is the limit of locked memory too low?") from error


class NixlWire(BlockWire):
    """Frames until the store has accepted `memory`. `spawn(coroutine, name)` makes a task."""

    def __init__(
        self,
        links: Sequence[Link],
        layout: KvLayout,
        moving: Moving,
        clock: Clock,
        aside: Aside,
        *,
        memory: Pieces,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        super().__init__(links, layout, moving, clock, aside)
        self._memory = memory
        self._spawn = spawn
        self.is_accepted = False

    def welcomed(self, welcome: Welcome) -> None:
        """See BlockWire."""
        super().welcomed(welcome)
        if not welcome.nixl:
            log.warning("nixl_not_offered", reason="the store has no --nixl-devices")
        elif not self.is_accepted:
            self._spawn(self.offer(), "offer-memory")

    async def offer(self) -> None:
        """Tell the store of our memory."""
        memory = self._memory
        message = OfferMemory(
            metadata=memory.agent.metadata(), address=memory.address, num_bytes=memory.num_bytes
        )
        try:
            await self._link().call(message)
            self.is_accepted = True
            log.info("nixl_used")
        except KvbatonError as error:
            log.warning("nixl_not_used", reason=error.message)

    async def put(
        self, message: PutBlocks, blocks: Frames, digests: Callable[[Frames], list[bytes]]
    ) -> None:
        """See BlockWire."""
        if self.is_accepted:
            try:
                await self._put(message, blocks, digests)
            except (UnavailableError, OverloadedError) as error:
                self._failed(error)
                message.offset = None
            else:
                return
        await super().put(message, blocks, digests)

    async def get(self, message: GetBlocks) -> tuple[list[bytes], Frames]:
        """See BlockWire."""
        if self.is_accepted:
            try:
                return await self._get(message)
            except (UnavailableError, OverloadedError) as error:
                self._failed(error)
                message.offset = None
        return await super().get(message)

    async def _put(
        self, message: PutBlocks, blocks: Frames, digests: Callable[[Frames], list[bytes]]
    ) -> None:
        num_blocks = len(blocks)
        with self._memory.lent() as piece, self._timed(self._moving.pushes, "", num_blocks):
            copies = piece.blocks(num_blocks, self._layout.block_bytes)
            for copy, block in zip(copies, blocks, strict=True):
                copy[:] = block
            message.digests, message.offset = digests(copies), piece.offset
            await self._ask(message)

    async def _get(self, message: GetBlocks) -> tuple[list[bytes], Frames]:
        num_blocks = len(message.indexes)
        with self._memory.lent() as piece, self._timed(self._moving.pulls, "", num_blocks):
            message.offset = piece.offset
            answer = await self._ask(message)
            assert isinstance(answer, BlockBytes)
            if not (answer.is_placed and len(answer.digests) == num_blocks):
                raise ProtocolError(f"asked for {num_blocks} blocks in memory, got others")
            return answer.digests, piece.blocks(num_blocks, self._layout.block_bytes)

    async def _ask(self, message: Message) -> Message:
        with self._memory.agent.busy():
            return await self._link().call(message)

    def _failed(self, error: KvbatonError) -> None:
        """A store that has no memory left for now is asked again; one that cannot is not."""
        self.is_accepted = isinstance(error, OverloadedError)
        log.warning("nixl_failed", reason=error.message, is_tried_again=self.is_accepted)
