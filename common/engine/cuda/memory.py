"""KV in device memory that follows the arena: the shell around residency.py and copies.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from common.engine.cuda.copies import Copier, DevicePool, PinnedPages, address_of
from common.engine.cuda.residency import IntArray, PoolFullError, Residency, Step
from common.engine.kv_cache import KvCache
from common.kv.layout import KvLayout


class ArenaFollower:
    """Implements work.DeviceMemory. `pool` is what steps read and write.

    Decisions are taken under a lock, copies are made without it: fetches and saves on a thread of
    their own, beside the steps.
    """

    def __init__(
        self, layout: KvLayout, arena: memoryview, num_blocks: int, device: torch.device
    ) -> None:
        """`num_blocks` blocks in the pool, and the spare one. Raises ValueError as KvCache does."""
        host = KvCache(layout, arena)
        self._arena = arena
        self._block_bytes = layout.block_bytes
        self.pool = DevicePool(layout, num_blocks + 1, device)
        self.num_slots = host.num_blocks
        self._size = layout.block_size
        self._residency = Residency(host.num_blocks, num_blocks + 1)
        self._copier = Copier(host.blocks, self.pool.blocks)
        self._pages = PinnedPages(device)
        self._deciding = threading.Lock()
        self._copying = threading.Lock()  # by the thread of its own; steps do not run meanwhile
        self._making_room = (
            threading.Lock()
        )  # while what nobody asked for is saved, none forgets it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-copies")

    # ---- for the steps ------------------------------------------------------------------------

    def begin_step(self, tables: IntArray, starts: IntArray, ends: IntArray) -> Step:
        """See Residency.begin_step; what has to be copied in has been."""
        try:
            with self._deciding:
                step = self._residency.begin_step(tables, starts, ends, self._size)
        except PoolFullError:
            with self._making_room:
                self.save_sync(self._residency.unsaved())  # after the copies under way
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

    async def fetch(self, slots: Sequence[int]) -> None:
        """See work.DeviceMemory."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.fetch_sync, slots)

    async def save(self, slots: Sequence[int]) -> None:
        """See work.DeviceMemory."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.save_sync, slots)

    def fetch_sync(self, slots: Sequence[int]) -> None:
        """fetch on the caller's thread."""
        with self._copying:
            with self._deciding:
                copies = self._residency.begin_fetch(slots)
            self._copier.copy_in(copies)
            with self._deciding:
                self._residency.end_fetch(copies)

    def save_sync(self, slots: Sequence[int]) -> None:
        """save on the caller's thread."""
        with self._copying:
            with self._deciding:
                copies = self._residency.begin_save(slots)
            self._copier.copy_out(copies)
            with self._deciding:
                self._residency.end_save(copies)

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
        self._pages.release_all()
