"""A worker's stores: joined, watched, and each arena in its place in the engine's memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from common.config import StartError
from common.engine.work import Engine
from common.kv.arena import NoArenaError
from common.messages import Heartbeat, Load, Member, Message, WorkerCounts
from common.service import Seams, Tasks
from common.worker.memory import WorkerMemory
from common.worker.moving import Moving
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError, UnavailableError

_GRACE_S = 3.0  # what the first store to answer waits for the others: a lost shard holds up nobody


class Stores:
    """Links to every store. `attached` is set once the engine has its memory.

    `lost(store)` runs when a store has forgotten us: what we held there is gone. `engine_free` is
    held while a step runs: arenas change places only between steps.
    """

    def __init__(
        self,
        seams: Seams,
        tasks: Tasks,
        engine: Engine,
        engine_free: asyncio.Lock,
        mover: str,
        *,
        lost: Callable[[StoreLink], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.links: list[StoreLink] = []
        self.attached = asyncio.Event()
        self._seams = seams
        self._tasks = tasks
        self._engine = engine
        self._engine_free = engine_free
        self._mover = mover
        self._lost = lost
        self._failed = failed
        self._load: Callable[[], Load] = Load
        self._memory: WorkerMemory | None = None

    def join(
        self,
        endpoints: list[str],
        *,
        describe: Callable[[str], Member],
        load: Callable[[], Load],
        counts: Callable[[], WorkerCounts],
        moving: Moving,
        handle: Callable[[StoreLink, Message], None],
    ) -> None:
        """Say hello to every store."""
        self._load = load
        self.links = [
            StoreLink(
                index,
                endpoint,
                self._seams,
                self._tasks,
                describe=describe,
                load=load,
                counts=counts,
                moving=moving,
                handle=handle,
                rejoin=self._welcomed,
                refused=self._refused,
            )
            for index, endpoint in enumerate(endpoints)
        ]

    def leave(self) -> None:
        """Tell every store that we write no more and go."""
        for store in self.links:
            store.leave()

    def close(self) -> None:
        for store in self.links:
            store.close()

    def _refused(self, error: KvbatonError) -> None:
        self._failed(error)

    def _welcomed(self, store: StoreLink) -> None:
        self._tasks.spawn(self._rejoin(store), "rejoin")

    async def _rejoin(self, store: StoreLink) -> None:
        """A new incarnation of us is welcome: what the earlier one held there is gone."""
        self._lost(store)
        async with self._engine_free:
            store.stopped()
            if self._memory is not None:
                self._attach([store])
        if self._memory is None:
            if any(not other.welcome.num_blocks for other in self.links):
                await asyncio.sleep(_GRACE_S)
            async with self._engine_free:
                if self._memory is None:
                    self._attach([other for other in self.links if other.welcome.num_blocks])

    def _attach(self, stores: list[StoreLink]) -> None:
        """Put the arenas of `stores` in their places."""
        try:
            self._put_in_place(stores)
        except (StartError, UnavailableError) as error:
            self._failed(error)

    def _put_in_place(self, stores: list[StoreLink]) -> None:
        block_bytes = self._engine.info.layout.block_bytes
        if self._memory is None:
            most_blocks = max(store.welcome.num_blocks for store in stores)
            num_places = len(self.links)
            self._memory = WorkerMemory(self._seams.disk, block_bytes, most_blocks, num_places)
            self._engine.attach(self._memory.all)
        for store in stores:
            place = self._memory.place(store.index)
            if store.welcome.num_blocks * block_bytes > len(place):
                raise UnavailableError(
                    f"the arena of {store.link.endpoint} is larger than those of the stores that "
                    "answered at the start: this worker has to start again"
                )
            shared = self._is_shared(store)
            try:
                with self._replacing(place):
                    if shared:
                        self._memory.map(store.index, store.welcome.arena_path)
            except NoArenaError as error:
                self._tasks.spawn(self._confirm(store, error), "arena")
                continue
            first_slot = self._memory.first_slot(store.index)
            device = self._engine.device_memory
            store.ready(place, first_slot, self._engine.info.layout, device, shared=shared)
        self.attached.set()

    def _replacing(self, place: memoryview) -> AbstractContextManager[None]:
        device = self._engine.device_memory
        return device.replacing(place) if device else nullcontext()

    async def _confirm(self, store: StoreLink, error: NoArenaError) -> None:
        """A store that has ended since its welcome has taken its arena with it, and another will
        welcome us. One that still answers has an arena that we shall never see."""
        welcome = store.welcome
        with contextlib.suppress(KvbatonError):
            await store.link.call(Heartbeat(load=self._load()))
            if store.welcome is welcome:
                self._failed(error)

    def _is_shared(self, store: StoreLink) -> bool:
        if self._mover == "auto":
            return store.welcome.host_id == self._seams.host_id
        return self._mover == "shm"
