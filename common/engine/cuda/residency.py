"""Which blocks of the arena are in device memory, and which of them are what the arena should hold.

Pure: the shell (memory.py) copies, and tells here when copies and steps begin and end. Rules:

- A slot of the arena has at most one block of the pool. What steps read and write is in the pool.
- A block that steps wrote and that was not copied out is unsaved. It is not evicted before it is
  saved, or forgotten once nobody will ask for it. The others are evicted when room is needed, the
  longest unused first: the arena has what they hold.
- A fetch brings what another process wrote. It fills a block of its own, which becomes the slot's
  in the end if nothing has changed the slot meanwhile: a step that runs goes on reading what it
  began with, and a fetch that was overtaken leaves no trace. What is unsaved is never replaced:
  only one process writes a slot at a time, so it is newer.
- Block 0 belongs to nobody: rows that fill up a batch write and read it.
- A block that is as the arena has it may have a name, which tells its content (neighbours.py). It
  has none any more before anything writes over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

SPARE_BLOCK = 0
_NONE = -1
_ONE = np.int32(1)  # of the array's own type: ufunc.at takes twenty times as long for another

NAME_WORDS = 4  # of 64 bits: a block's key (common/kv/hashing.py)
NAME_ROWS = NAME_WORDS + 1

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.signedinteger[Any]]]
NameArray = np.ndarray[tuple[int, int], np.dtype[np.uint64]]


Marked = Mapping[int, tuple[bytes, int]]  # by slot: the name of its content, and which that is

_UNNAMED: Mapping[int, bytes] = MappingProxyType({})
_UNMARKED: Marked = MappingProxyType({})


def words_of(name: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """[NAME_WORDS]; zeros for no name."""
    return np.frombuffer(name or bytes(8 * NAME_WORDS), dtype=np.uint64)


class PoolFullError(Exception):
    """The pool has no room for all that is wanted at once."""

    def __init__(self, num_wanted: int, num_blocks: int) -> None:
        super().__init__(
            f"{num_wanted} more KV blocks are needed at once than a pool of {num_blocks} has to "
            "give: allow more with --device-kv-bytes"
        )


@dataclass(frozen=True, slots=True)
class Copies:
    """Slots of the arena, the blocks of the pool that go with them, and which content that is."""

    slots: IntArray
    blocks: IntArray
    versions: IntArray

    def without(self, places: IntArray) -> Copies:
        """All but those at these places."""
        return Copies(
            *(np.delete(each, places) for each in (self.slots, self.blocks, self.versions))
        )


@dataclass(frozen=True, slots=True)
class Step:
    """`tables` are the step's block tables in terms of the pool, padded with SPARE_BLOCK. `loads`
    have to be copied in before it runs. `blocks` are held until it has ended, once for each use."""

    tables: IntArray
    loads: Copies
    blocks: IntArray


class Residency:
    """Decisions for a pool of `num_blocks`, the spare one included, and an arena of `num_slots`.

    `names` [NAME_ROWS, num_blocks] are those of the pool's blocks, zeros where there is none, and
    last how often each block has lost one."""

    def __init__(self, num_slots: int, num_blocks: int, names: NameArray | None = None) -> None:
        self.num_blocks = num_blocks
        self.names = np.zeros((NAME_ROWS, num_blocks), np.uint64) if names is None else names
        self._block_of = np.full(num_slots, _NONE, dtype=np.int32)
        self._is_unsaved = np.zeros(num_slots, dtype=np.bool_)
        self._version = np.zeros(num_slots, dtype=np.int64)  # raised by whatever changes the slot
        self._used_at = np.zeros(num_slots, dtype=np.int64)
        self._slot_of = np.full(num_blocks, _NONE, dtype=np.int32)
        self._num_uses = np.zeros(num_blocks, dtype=np.int32)  # steps and saves under way
        self._free = list(range(num_blocks - 1, SPARE_BLOCK, -1))
        self._now = 0

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing and into which nothing is copied."""
        return len(self._free)

    # ---- steps --------------------------------------------------------------------------------

    def begin_step(self, tables: IntArray, starts: IntArray, ends: IntArray, size: int) -> Step:
        """A step over sequences with these tables of slots [sequences, width], in blocks of `size`
        positions; it reads positions below `starts` and writes those from there to `ends`.

        Raises PoolFullError, and changes nothing, where they do not all fit.
        """
        firsts = np.arange(tables.shape[1]) * size
        is_used = firsts < ends[:, None]
        is_read = firsts < starts[:, None]
        is_written = is_used & (firsts + size > starts[:, None])
        slots = tables[is_used]
        held = self._block_of[slots]
        is_missing = held == _NONE
        missing = np.unique(slots[is_missing])
        held = held[~is_missing]
        np.add.at(self._num_uses, held, _ONE)
        try:
            new = self._take(len(missing))
        except PoolFullError:
            np.subtract.at(self._num_uses, held, _ONE)
            raise
        self._num_uses[new] += 1
        self._put(missing, new)
        written = tables[is_written]
        self._unname(self._block_of[written])
        self._is_unsaved[written] = True
        self._version[written] += 1
        self._touch(slots)
        loads = missing[np.isin(missing, tables[is_read])] if len(missing) else missing
        located = np.where(is_used, self._block_of[tables], SPARE_BLOCK)
        return Step(located, self._copies(loads), np.concatenate((held, new)))

    def end_step(self, step: Step) -> None:
        """What it wrote is there."""
        self._release(step.blocks)

    def drop(self, copies: Copies) -> None:
        """What was to be copied in for a step is not there; to be called before the step ends."""
        self._vacate(copies.slots)

    # ---- saving -------------------------------------------------------------------------------

    def unsaved(self) -> list[int]:
        """All slots whose block is not in the arena."""
        return np.flatnonzero(self._is_unsaved).tolist()

    def begin_save(self, slots: Sequence[int]) -> Copies:
        """What has to be copied out so that the arena holds these slots."""
        wanted = np.unique(np.asarray(slots, dtype=np.int64))
        copies = self._copies(wanted[self._is_unsaved[wanted]])
        self._num_uses[copies.blocks] += 1
        return copies

    def marked(self, named: Mapping[int, bytes]) -> Marked:
        """What these slots, by name, hold now."""
        return {slot: (name, int(self._version[slot])) for slot, name in named.items()}

    def end_save(self, copies: Copies, marked: Marked = _UNMARKED) -> None:
        """It is in the arena. What has not changed since it was marked gets its name."""
        is_unchanged = self._version[copies.slots] == copies.versions
        unchanged = copies.slots[is_unchanged]
        self._is_unsaved[unchanged] = False
        for slot, block in zip(unchanged.tolist(), copies.blocks[is_unchanged], strict=True):
            name, version = marked.get(slot, (b"", 0))
            if version == self._version[slot] and block == self._block_of[slot]:
                self._name(block, name)
        self._release(copies.blocks)

    def forget(self, slots: Sequence[int]) -> None:
        """Nobody will ask for what is unsaved of these."""
        wanted = np.unique(np.asarray(slots, dtype=np.int64))
        self._vacate(wanted[self._is_unsaved[wanted]])

    def clear(self, first_slot: int, num_slots: int) -> None:
        """Other memory is mapped where these were. No step and no copy is under way."""
        slots = np.arange(first_slot, min(first_slot + num_slots, len(self._block_of)))
        self._version[slots] += 1
        self._vacate(slots)

    # ---- fetching -----------------------------------------------------------------------------

    def begin_fetch(self, slots: Sequence[int]) -> Copies:
        """Others have written these slots: what to copy in. Those for which there is no room are
        left to the step that reads them."""
        wanted = np.unique(np.asarray(slots, dtype=np.int64))
        wanted = wanted[~self._is_unsaved[wanted]]
        self._version[wanted] += 1
        fitting = wanted[: self._num_available()]
        self._vacate(wanted[len(fitting) :])
        return Copies(fitting, self._take(len(fitting)), self._version[fitting])

    def end_fetch(self, copies: Copies, named: Mapping[int, bytes] = _UNNAMED) -> None:
        """It is in the pool. `named`: of which it is certain that they hold what they are to: the
        arena's slot may be another's since it was asked for."""
        is_current = self._version[copies.slots] == copies.versions
        self._free.extend(copies.blocks[~is_current].tolist())
        slots = copies.slots[is_current]
        self._vacate(slots)
        self._put(slots, copies.blocks[is_current])
        for slot, name in named.items():
            if slot in slots:
                self._name(self._block_of[slot], name)
        self._touch(slots)

    def abandon(self, copies: Copies) -> None:
        """It has not come: a step that reads these loads them."""
        self._free.extend(copies.blocks.tolist())
        self._vacate(copies.slots[self._version[copies.slots] == copies.versions])

    # ---- blocks of the pool -------------------------------------------------------------------

    def _copies(self, slots: IntArray) -> Copies:
        return Copies(slots, self._block_of[slots], self._version[slots])

    def _touch(self, slots: IntArray) -> None:
        self._now += 1
        self._used_at[slots] = self._now

    def _put(self, slots: IntArray, blocks: IntArray) -> None:
        self._block_of[slots] = blocks
        self._slot_of[blocks] = slots

    def _name(self, block: int, name: bytes) -> None:
        self.names[:NAME_WORDS, block] = words_of(name)

    def _unname(self, blocks: IntArray) -> None:
        self.names[:NAME_WORDS, blocks] = 0
        self.names[NAME_WORDS, blocks] += np.uint64(1)

    def _vacate(self, slots: IntArray) -> None:
        """These slots have no block any more; one that is used is free when its use ends."""
        slots = slots[self._block_of[slots] != _NONE]
        blocks = self._block_of[slots]
        self._unname(blocks)
        self._block_of[slots] = self._slot_of[blocks] = _NONE
        self._is_unsaved[slots] = False
        self._free.extend(blocks[self._num_uses[blocks] == 0].tolist())

    def _release(self, blocks: IntArray) -> None:
        """One use of each ends, as often as it is listed."""
        np.subtract.at(self._num_uses, blocks, _ONE)
        orphans = blocks[self._slot_of[blocks] == _NONE]
        if len(orphans):
            self._free.extend(np.unique(orphans[self._num_uses[orphans] == 0]).tolist())

    def _evictable(self) -> IntArray:
        slots: IntArray = np.flatnonzero((self._block_of != _NONE) & ~self._is_unsaved)
        evictable: IntArray = slots[self._num_uses[self._block_of[slots]] == 0]
        return evictable

    def _num_available(self) -> int:
        return len(self._free) + len(self._evictable())

    def _take(self, count: int) -> IntArray:
        """So many free blocks; slots lose theirs if need be."""
        num_short = count - len(self._free)
        if num_short > 0:
            evictable = self._evictable()
            if num_short > len(evictable):
                raise PoolFullError(num_short - len(evictable), self.num_blocks)
            oldest = np.argsort(self._used_at[evictable], kind="stable")[:num_short]
            self._vacate(evictable[oldest])
        return np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
