"""Moves blocks between memory and disk: written before they are evicted, loaded before they are
needed.

While memory is short the coldest cached blocks go to the disk, so that evicting them costs nothing
then. A prompt whose next blocks are on the disk has them loaded before it stands in line for room,
if that is sooner than computing them. Without its disk the store serves on, from memory alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from common.config import StartError
from common.service import Tasks
from services.kvstore.blocks import BlockName, BlockState
from services.kvstore.disk.tier import DiskTier
from services.kvstore.handoff import Handoff
from services.kvstore.ledger import Ledger
from services.kvstore.notes import Notes
from services.kvstore.staging import WRITER

log = structlog.get_logger()

_BATCH_BYTES = 8 << 20  # written or loaded at once
_LEAST_WAIT_S, _USUAL_WAIT_S = 1.0, 5.0  # for a load, if computing takes no longer, or not known
_BATCH_SHARE = 16  # and no more than one block in so many: a slow disk must not hold the memory


class Tiering:
    """One ledger's blocks and one disk.

    `prefill_rate()` is in tokens per second, 0 if not known. `prepared(handoff_id)` is called when
    a handoff that waited for the disk has waited enough; it need not be the first time. What
    `is_damaged(block, key)` is not written, and not found any more.
    """

    def __init__(
        self,
        tier: DiskTier,
        ledger: Ledger,
        arena: memoryview,
        block_bytes: int,
        *,
        notes: Notes,
        is_damaged: Callable[[int, bytes], bool],
        tasks: Tasks,
        prefill_rate: Callable[[], float],
        prepared: Callable[[str], None],
    ) -> None:
        self.tier = tier
        self._ledger = ledger
        self._arena = arena
        self._block_bytes = block_bytes
        at_most = max(1, ledger.pool.num_blocks // _BATCH_SHARE)
        self._batch = min(max(1, _BATCH_BYTES // block_bytes), at_most)
        self._notes = notes
        self._is_damaged = is_damaged
        # All that is to be evicted soon must fit on the disk at once, or it would write for ever.
        ledger.staging.window = min(ledger.staging.window, max(1, tier.num_safe // 2))
        self._prefill_rate = prefill_rate
        self._prepared = prepared
        self.num_damaged = 0  # blocks that were not written: their bytes had changed in memory
        self.is_overdue = False  # the disk has a load that takes far too long
        self._is_open = False
        self._news = asyncio.Event()
        self._loading = asyncio.Lock()  # one prompt at a time: the disk is one
        self._num_indexed = 0  # the pool's when there was nothing to write
        self._tasks = tasks
        self._task = tasks.spawn(self._run(), "disk")

    def stop(self) -> None:
        """Begin no more work. What is under way ends by itself."""
        self._is_open = False
        self._task.cancel()

    # ---- writing ------------------------------------------------------------------------------

    def look(self) -> None:
        """Blocks have changed: there may be some to write. Cheap, for after every message."""
        pool = self._ledger.pool
        if pool.num_indexed != self._num_indexed and self._ledger.staging.is_due:
            self._news.set()

    async def _run(self) -> None:
        try:
            await self.tier.open()
        except StartError as error:
            log.error("disk_tier_unusable", reason=str(error))
            return
        self._is_open = True
        while True:
            if not await self._write_cold():
                self._news.clear()
                await self._news.wait()

    async def _write_cold(self) -> bool:
        """Write a batch of the blocks that will be evicted soon. False if there is none, or the
        disk takes none."""
        staging, pool = self._ledger.staging, self._ledger.pool
        self._num_indexed = pool.num_indexed
        most = min(self._batch, self._ledger.room)
        if self.tier.is_paused or not staging.is_due or most < 1:
            return False
        taken = staging.take_cold(most, self.tier.is_safe)
        if not taken:
            return False
        sound = [(block, name) for block, name in taken if not self._drop_damaged(block, name)]
        try:
            is_stored = await self.tier.store([(name, self._bytes(block)) for block, name in sound])
            if is_stored:
                self._notes.blocks("blocks_stored", [block for block, _ in sound])
            return is_stored
        finally:
            for block, name in sound:
                if pool[block].name is None:  # a worker found it corrupt meanwhile
                    self.tier.forget(name.key)
            staging.written([block for block, _ in taken])
            self._prepared("")  # who waits for room may have it now

    def _drop_damaged(self, block: int, name: BlockName) -> bool:
        if not self._is_damaged(block, name.key):
            return False
        self.num_damaged += 1
        log.error("blocks_corrupt", block=block)
        self._ledger.pool.discard(block)
        self._notes.blocks("blocks_discarded", [block])
        return True

    # ---- loading ------------------------------------------------------------------------------

    def load_first(self, handoff: Handoff) -> bool:
        """Whether the handoff had better wait for blocks from the disk; `prepared` tells when."""
        if not self._is_open or self.is_overdue or not self._plan(handoff)[1]:
            return False
        self._tasks.spawn(self._load_in_time(handoff), "load")
        return True

    def _plan(self, handoff: Handoff) -> tuple[list[int], list[bytes]]:
        """Of the run of the prompt's blocks that is in memory or on the disk, as far as all of it
        has room at once: the blocks found, and the keys to load. No keys: it is not worth it."""
        pool, room = self._ledger.pool, self._ledger.room
        found: list[int] = []
        missing: list[bytes] = []
        for key in self._ledger.usable_keys(handoff):
            block = pool.find(key)
            if block is None and key not in self.tier:
                break
            room -= block is None or pool[block].state is BlockState.CACHED
            if room < 0:
                break
            if block is None:
                missing.append(key)
            else:
                found.append(block)
        block_size = self._ledger.block_size
        if missing and self.tier.is_worth_loading(len(missing), block_size, self._prefill_rate()):
            return found, missing
        return [], []

    async def _load_in_time(self, handoff: Handoff) -> None:
        """A prompt waits for the disk about as long as computing it would take."""
        rate = self._prefill_rate()
        wait_s = max(_LEAST_WAIT_S, handoff.num_tokens / rate) if rate else _USUAL_WAIT_S
        load = self._tasks.spawn(self._load(handoff), "load")
        await asyncio.wait([load], timeout=wait_s)
        if not load.done():
            self.is_overdue = True
            log.warning("disk_overdue", handoff=handoff.handoff_id)
            self._prepared(handoff.handoff_id)

    async def _load(self, handoff: Handoff) -> None:
        """Load each block at most once: what is evicted again, in a store so full, is computed."""
        staging = self._ledger.staging
        async with self._loading:
            try:
                # Others may have loaded the same meanwhile, or room may be gone.
                if handoff.handoff_id in self._ledger.handoffs:
                    found, missing = self._plan(handoff)
                    staging.hold(found)
                    for start in range(0, len(missing), self._batch):
                        batch = missing[start : start + self._batch]
                        if len(batch) > self._ledger.room or not await self._load_batch(batch):
                            break
                        handoff.num_loaded += len(batch)
            finally:
                self.is_overdue = False
                # What is held for it becomes its own now, if there is room for the rest.
                self._prepared(handoff.handoff_id)
                staging.let_go()
                self._prepared("")

    async def _load_batch(self, keys: list[bytes]) -> bool:
        """Load these blocks. False if one could not be: what follows it would not be found."""
        staging = self._ledger.staging
        num_evicted = self._ledger.pool.num_evicted
        blocks = staging.take_free(len(keys))
        num_evicted = self._ledger.pool.num_evicted - num_evicted
        self._notes.granted("blocks_lent", blocks, num_evicted, WRITER)
        names: list[BlockName | None] = [None] * len(keys)
        try:
            names = await self.tier.load(
                [(key, self._bytes(block)) for key, block in zip(keys, blocks, strict=True)]
            )
        finally:
            loaded = staging.loaded(blocks, names)
            self._notes.blocks("blocks_loaded", loaded)
            staging.hold([block for block in loaded if self._ledger.pool[block].name is not None])
        return None not in names

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]
