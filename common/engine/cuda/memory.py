"""KV in device memory that follows the arena: the shell around residency.py and copies.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import structlog
import torch

from common.engine.cuda.copies import Copier, DevicePool, PinnedPages, address_of
from common.engine.cuda.ipc import SharingError
from common.engine.cuda.neighbours import Neighbours, Sharing
from common.engine.cuda.notices import default_folder
from common.engine.cuda.residency import (
    Copies,
    IntArray,
    Marked,
    PoolFullError,
    Residency,
    Step,
)
from common.engine.kv_cache import KvCache
from common.engine.work import Fetched
from common.kv.layout import KvLayout

log = structlog.get_logger()

_NOTHING = np.zeros(0, dtype=np.int64)


class ArenaFollower:
    """Implements work.DeviceMemory. `pool` is what steps read and write. With `make_sharing`
    other processes on the device copy from it, and this one from theirs, where that can be done.

    Decisions are taken under a lock, copies are made without it: fetches and saves on a thread of
    their own, beside the steps.
    """

    def __init__(
        self,
        layout: KvLayout,
        arena: memoryview,
        num_blocks: int,
        device: torch.device,
        make_sharing: Callable[[], Sharing] | None = None,
    ) -> None:
        """`num_blocks` blocks in the pool, and the spare one. Raises ValueError as KvCache does."""
        host = KvCache(layout, arena)
        self._arena = arena
        self._block_bytes = layout.block_bytes
        self.pool = DevicePool.of_zeros(layout, num_blocks + 1, device)
        self.num_slots = host.num_blocks
        self._size = layout.block_size
        self._copier = Copier(host.blocks, self.pool.blocks)
        self._pages = PinnedPages(device)
        self._deciding = threading.Lock()
        self._copying = threading.Lock()  # by the thread of its own; steps do not run meanwhile
        self._making_room = (
            threading.Lock()
        )  # while what nobody asked for is saved, none forgets it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-copies")
        neighbours = self._neighbours = self._join(make_sharing) if make_sharing else None
        names = neighbours.names if neighbours else None
        self._residency = Residency(host.num_blocks, num_blocks + 1, names)

    def _join(self, make_sharing: Callable[[], Sharing]) -> Neighbours | None:
        """None where the pool cannot be shared."""
        try:
            return Neighbours(default_folder(), self.pool, make_sharing(), self._copying)
        except (SharingError, OSError) as error:
            log.warning("pool_not_shared", reason=str(error), using="the arena")
            return None

    # ---- for the steps ------------------------------------------------------------------------

    def begin_step(self, tables: IntArray, starts: IntArray, ends: IntArray) -> Step:
        """See Residency.begin_step; what has to be copied in has been."""
        try:
            with self._deciding:
                step = self._residency.begin_step(tables, starts, ends, self._size)
        except PoolFullError:
            with self._making_room:
                unsaved = dict.fromkeys(self._residency.unsaved(), b"")
                self.save_sync(unsaved)  # after the copies under way
            with self._deciding:
                step = self._residency.begin_step(tables, starts, ends, self._size)
        try:
            self._copier.copy_in(step.loads)
        except BaseException:
            with self._deciding:
                self._residency.drop(step.loads)
                self._residency.end_step(step)
            raise
        return step

    def end_step(self, step: Step) -> None:
        """The device has done all that the step asked of it."""
        with self._deciding:
            self._residency.end_step(step)

    # ---- for the worker -----------------------------------------------------------------------

    async def fetch(self, named: Mapping[int, bytes]) -> Fetched:
        """See work.DeviceMemory."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.fetch_sync, named)

    async def save(self, named: Mapping[int, bytes]) -> None:
        """See work.DeviceMemory. What is named is what the slots hold now: when the copy has its
        turn they may be another's."""
        with self._deciding:
            marked = self._residency.marked(named)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._save, marked)

    def fetch_sync(self, named: Mapping[int, bytes]) -> Fetched:
        """fetch on the caller's thread."""
        with self._copying:
            with self._deciding:
                copies = self._residency.begin_fetch(list(named))
            try:
                done = self._copy_across(copies, named)
                self._copier.copy_in(copies.without(done))
            except BaseException:
                with self._deciding:
                    self._residency.abandon(copies)
                raise
            verified = {slot: named[slot] for slot in copies.slots[done].tolist()}
            with self._deciding:
                self._residency.end_fetch(copies, verified)
        return Fetched(len(copies.slots), len(done))

    def _copy_across(self, copies: Copies, named: Mapping[int, bytes]) -> IntArray:
        """The places in `copies` that neighbours had."""
        if self._neighbours is None:
            return _NOTHING
        return self._neighbours.copy(copies, named, self._copier)

    def save_sync(self, named: Mapping[int, bytes]) -> None:
        """save on the caller's thread."""
        with self._deciding:
            marked = self._residency.marked(named)
        self._save(marked)

    def _save(self, marked: Marked) -> None:
        with self._copying:
            with self._deciding:
                copies = self._residency.begin_save(list(marked))
            self._copier.copy_out(copies)
            with self._deciding:
                self._residency.end_save(copies, marked)

    def forget(self, slots: Sequence[int]) -> None:
        """See work.DeviceMemory."""
        with self._making_room, self._deciding:
            self._residency.forget(slots)

    @contextmanager
    def replacing(self, place: memoryview) -> Iterator[None]:
        """See work.DeviceMemory."""
        first_slot = (address_of(place) - address_of(self._arena)) // self._block_bytes
        with self._copying:
            with self._deciding:
                self._residency.clear(first_slot, -(-place.nbytes // self._block_bytes))
            self._pages.release(place)
            try:
                yield
            finally:
                self._pages.pin(place)

    def close(self) -> None:
        """Wait for the copies under way and let go of the arena's pages."""
        self._thread.shutdown()
        if self._neighbours is not None:
            self._neighbours.close()
        self._pages.release_all()
