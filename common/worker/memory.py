"""The engine's memory: a place for each store's arena, side by side."""

from __future__ import annotations

import math

from common.seams import Disk

_PAGE_BYTES = 4096


class WorkerMemory:
    """One range of memory with a place for each store.

    A place holds the store's arena itself where it can be mapped, and else private memory of the
    same size, in which a block has the same number.
    """

    def __init__(self, disk: Disk, block_bytes: int, num_blocks: int, num_places: int) -> None:
        """`num_blocks` in each place. Private memory is taken page by page as it is touched."""
        self._disk = disk
        self._block_bytes = block_bytes
        unit = math.lcm(block_bytes, _PAGE_BYTES)  # a place starts at a page and at a block
        self._place_bytes = -(-num_blocks * block_bytes // unit) * unit
        self.all = disk.reserve(self._place_bytes * num_places)

    def map(self, index: int, arena_path: str) -> None:
        """Put a store's arena in its place. Raises NoArenaError if there is none, ArenaError if
        it cannot be mapped."""
        self._disk.map_into(self.all, index * self._place_bytes, arena_path, self._place_bytes)

    def place(self, index: int) -> memoryview:
        """The memory of one store."""
        return self.all[index * self._place_bytes : (index + 1) * self._place_bytes]

    def first_slot(self, index: int) -> int:
        """What to add to a store's block numbers to find its blocks in `all`."""
        return index * self._place_bytes // self._block_bytes
