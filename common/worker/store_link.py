"""A worker's connection to one KV store: membership, the arena, leases and block moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from common.engine.work import DeviceMemory
from common.incarnations import FormerIds
from common.kv.layout import KvLayout
from common.messages import (
    INTERNAL_VERSION,
    Commit,
    FromStore,
    GiveBack,
    Heartbeat,
    Hello,
    Lease,
    Leased,
    Leave,
    Load,
    Member,
    Message,
    Welcome,
    WorkerCounts,
    decoder,
)
from common.net.addresses import reachable
from common.net.link import Link
from common.service import Seams, Tasks
from common.worker.block_wire import BlockWire
from common.worker.device_mover import DeviceMover
from common.worker.lease import BlockLease
from common.worker.mover import Mover, ShmMover, ZmqMover
from common.worker.moving import Moving
from common.worker.nixl_wire import NixlWire
from common.worker.sequence import Sequence
from kvbaton.errors import ConnectionLostError, KvbatonError

log = structlog.get_logger()

HEARTBEATS_MISSED = 3


class StoreLink:
    """One store as a worker sees it.

    Each welcome starts a new incarnation: what an earlier one held is lost, `rejoin(self)` is
    called, and the worker answers with `stopped()` when its running step has ended, then with
    `ready()`.
    """

    def __init__(
        self,
        index: int,
        endpoint: str,
        seams: Seams,
        tasks: Tasks,
        *,
        describe: Callable[[str], Member],
        load: Callable[[], Load],
        counts: Callable[[], WorkerCounts],
        moving: Moving,
        handle: Callable[[StoreLink, Message], None],
        rejoin: Callable[[StoreLink], None],
        refused: Callable[[KvbatonError], None],
    ) -> None:
        self.index = index
        self.lease = BlockLease()
        self.welcome = Welcome(instance_id="")
        self.member_id = seams.rng.new_id()
        self.mover: Mover = ShmMover()
        self.first_slot = 0
        self._former_ids = FormerIds()
        self._is_ready = False
        self._seams = seams
        self._tasks = tasks
        self._describe = describe
        self._load = load
        self._counts = counts
        self._moving = moving
        self._handle = handle
        self._rejoin = rejoin
        self._refused = refused
        self._data: BlockWire | None = None
        self.link = Link(
            seams.transport,
            endpoint,
            decoder(FromStore),
            role="kvstore",
            hello=self._hello,
            welcomed=self._welcomed,
            handle=self._handle_push,
            refused=refused,
            lost=self._lost,
        )
        tasks.spawn(self._beat(), f"heartbeat-{index}")

    def _handle_push(self, message: Message) -> None:
        if isinstance(message, Leased):
            self.give_back(message.blocks)  # too late: the one who asked has given up
        else:
            self._handle(self, message)

    # ---- membership ---------------------------------------------------------------------------

    def _lost(self) -> None:
        """Introduce ourselves at once when the store is back, not with the next heartbeat."""
        log.warning("store_lost", store=self.link.endpoint)
        self.link.reset()

    def _hello(self) -> Hello:
        if self.welcome.instance_id and self.link.is_introduced:
            self._former_ids.add(self.member_id)
            self.member_id = self._seams.rng.new_id()
            self._is_ready = False
        return self._introduction()

    def _introduction(self) -> Hello:
        return Hello(internal_version=INTERNAL_VERSION, member=self._describe(self.member_id))

    def _welcomed(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.lease.clear()
        self._rejoin(self)

    def stopped(self) -> None:
        """The last step of earlier incarnations has ended."""
        self._former_ids.say_stopped(self.link, self._tasks)

    def ready(
        self,
        arena: memoryview,
        first_slot: int,
        layout: KvLayout,
        device: DeviceMemory | None,
        *,
        shared: bool,
    ) -> None:
        """The engine is attached: `arena` is this store's part of its memory."""
        self.first_slot = first_slot
        if shared:
            self.mover = ShmMover()
        else:
            if self._data is not None:
                self._data.close()
            self._data = self._data_wire(layout)
            self.mover = ZmqMover(
                self._data, arena, layout.block_bytes, self._moving, self._seams.clock
            )
        if device is not None:
            self.mover = DeviceMover(
                self.mover, device, first_slot, layout.block_bytes, self._moving.counts
            )
        self._is_ready = True
        self.tell()

    def _data_wire(self, layout: KvLayout) -> BlockWire:
        links = [self._data_link() for _ in range(self._moving.num_connections)]
        given = links, layout, self._moving, self._seams.clock, self._seams.aside
        memory = self._moving.memory
        if memory is None:
            return BlockWire(*given)
        return NixlWire(*given, memory=memory, spawn=self._tasks.spawn)

    def _data_welcomed(self, welcome: Welcome) -> None:
        if self._data is not None:
            self._data.welcomed(welcome)

    def _data_link(self) -> Link:
        return Link(
            self._seams.transport,
            reachable(self.welcome.data_endpoint, self.link.endpoint),
            decoder(FromStore),
            role="kvstore",
            hello=self._introduction,
            welcomed=self._data_welcomed,
            handle=lambda _: None,
            refused=self._data_refused,
        )

    def _data_refused(self, error: KvbatonError) -> None:
        """A restarted store may be reached here before it has welcomed us on the other socket."""
        log.info("data_hello_refused", store=self.link.endpoint, reason=error.message)

    def tell(self) -> None:
        """Say how we are now, not with the next heartbeat."""
        self.link.send(self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(load=self._load(), ready=self._is_ready, counts=self._counts())

    async def _beat(self) -> None:
        while True:
            interval_s = self.welcome.heartbeat_s
            await asyncio.sleep(interval_s)
            try:
                await self.link.call(self._heartbeat(), timeout_s=interval_s * HEARTBEATS_MISSED)
            except ConnectionLostError as error:
                log.warning("store_silent", store=self.link.endpoint, reason=error.message)
            for data in self._data.links if self._data is not None else ():
                if data.num_waiting:
                    self._tasks.spawn(self._beat_data(data), "data-heartbeat")

    async def _beat_data(self, data: Link) -> None:
        """Its number, or that of its answer, shows what was lost before: then the link begins anew,
        and what waits is tried again. One that is not answered shows nothing: the store may only
        be slow to read, and to send again what it has not read would take more of its room."""
        with contextlib.suppress(KvbatonError):
            await data.call(Heartbeat(), timeout_s=self.welcome.heartbeat_s * HEARTBEATS_MISSED)

    # ---- blocks -------------------------------------------------------------------------------

    def commits(self, sequence: Sequence) -> list[Commit]:
        """The commits that have become due. Bytes that move must arrive before they are sent."""
        due: list[Commit] = []
        while True:
            first, blocks, keys = sequence.new_blocks()
            if not blocks:
                return due
            due.append(
                Commit(
                    handoff_id=sequence.handoff_id,
                    epoch=sequence.epoch,
                    first_index=first,
                    blocks=blocks,
                    keys=keys,
                )
            )

    async def refill(self, num_blocks: int) -> None:
        """Ask for more spare blocks; the caller has marked the lease as asking."""
        lease, incarnation = self.lease, self.member_id
        try:
            leased = await self.link.call(Lease(num_blocks=num_blocks))
            assert isinstance(leased, Leased)
            if incarnation == self.member_id:
                self.mover.learn(leased.blocks[: len(leased.stamps)], leased.stamps)
                lease.add(leased.blocks)
                lease.starved = not leased.blocks and not lease
            else:
                self.give_back(leased.blocks)  # ours or not, by now: the store knows
        except KvbatonError as error:
            log.warning("lease_failed", store=self.link.endpoint, reason=error.message)
        finally:
            lease.asking = False

    def give_back(self, blocks: list[int]) -> None:
        """Return spare blocks."""
        if blocks:
            self.link.send(GiveBack(blocks=blocks))

    def leave(self) -> None:
        """Tell the store that we write no more and go."""
        self.link.send(Leave())

    def close(self) -> None:
        self.link.close()
        if self._data is not None:
            self._data.close()
