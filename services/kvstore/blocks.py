"""The block pool: every block of the arena is in exactly one state, and the counts always add up.

free -> granted (to one writer) -> committed (immutable, counted readers) -> cached (no readers,
evictable) -> free; and quarantined while a writer that lost the block may still be alive. Pure.

Each grant of a block gives it a new stamp, so that a block and its stamp name one content for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from services.kvstore.eviction import EvictionOrder, Order


class BlockState(StrEnum):
    """Where a block stands."""

    FREE = "free"
    GRANTED = "granted"
    COMMITTED = "committed"
    CACHED = "cached"
    QUARANTINED = "quarantined"


class BlockName(NamedTuple):
    """What a full block holds: `key` names its tokens and all before them, `parent` those before
    them alone; `tenant` tells whose share of the cache it counts for."""

    key: bytes
    parent: bytes
    tenant: bytes


@dataclass(slots=True)
class Block:
    """One block. `writer` while granted or quarantined; `name` and `num_readers` once committed.

    A committed block whose key another block already answers for is not indexed: its `name` is None
    and it is freed with its last reader. `is_corrupt`: its bytes are not what was written.
    """

    state: BlockState = BlockState.FREE
    writer: str = ""
    name: BlockName | None = None
    num_readers: int = 0
    stamp: int = 0
    is_corrupt: bool = False


class BlockJournal(Protocol):
    """Is told of what must be known of a block when its store has died (journal.py)."""

    def write(self, block_id: int, block: Block) -> None:
        """The block is another from now on; somebody uses it, unless it is free."""

    def used(self, block_id: int) -> None:
        """Somebody reads the final block, which nobody used."""

    def unused(self, block_id: int) -> None:
        """Nobody uses the final block any more."""


class BlockPool:
    """The blocks of one arena, numbered from 0."""

    def __init__(
        self, num_blocks: int, order: Order | None = None, journal: BlockJournal | None = None
    ) -> None:
        """`order`: which cached block goes first; the default unless given."""
        self._journal = journal
        self.num_blocks = num_blocks
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: Order = EvictionOrder(num_blocks) if order is None else order
        self._index: dict[bytes, int] = {}
        self._num_children: dict[bytes, int] = {}  # indexed blocks by their parent
        self.num_indexed = 0  # ever
        self.num_evicted = 0  # ever
        self._counts = dict.fromkeys(BlockState, 0) | {BlockState.FREE: num_blocks}

    def __getitem__(self, block_id: int) -> Block:
        return self._blocks[block_id]

    def is_granted(self, block_id: int, writer: str) -> bool:
        """Whether the block is there and `writer` may write it; any number can be asked about."""
        if not 0 <= block_id < self.num_blocks:
            return False
        block = self[block_id]
        return block.state is BlockState.GRANTED and block.writer == writer

    @property
    def num_available(self) -> int:
        """Blocks that a grant could take now: free ones, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that a grant takes without evicting."""
        return len(self._free)

    def find(self, key: bytes) -> int | None:
        """The block that answers for a key."""
        return self._index.get(key)

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest leading run of keys that is present."""
        found = []
        for key in keys:
            block_id = self._index.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_cached(self, block_ids: Iterable[int]) -> int:
        """How many of these would leave `num_available` if they were pinned."""
        return sum(self[block_id].state is BlockState.CACHED for block_id in block_ids)

    def pin(self, block_ids: Iterable[int]) -> None:
        """Add a reader to committed or cached blocks."""
        for block_id in block_ids:
            block = self[block_id]
            assert block.state in (BlockState.COMMITTED, BlockState.CACHED)
            if block.state is BlockState.CACHED:
                self._cached.remove(block_id)
                self._move(block, BlockState.COMMITTED)
                if self._journal is not None:
                    self._journal.used(block_id)
            block.num_readers += 1

    def unpin(self, block_ids: Sequence[int], *, cold: bool = False) -> None:
        """Take a reader away. Blocks without readers become cache, last of the chain first, so that
        eviction takes leaves before their parents. `cold`: as if they had not been used."""
        for block_id in reversed(block_ids):
            block = self[block_id]
            assert block.state is BlockState.COMMITTED
            assert block.num_readers > 0
            block.num_readers -= 1
            if block.num_readers:
                continue
            if block.name is None:
                self._set_free(block_id)
                self._write(block_id)
            else:
                self._move(block, BlockState.CACHED)
                self._cached.add(block_id, block.name.tenant, key=block.name.key, cold=cold)
                if self._journal is not None:
                    self._journal.unused(block_id)

    def grant(self, count: int, writer: str) -> list[int]:
        """Give `count` blocks to `writer`, evicting cache if need be; the caller has checked."""
        assert 0 <= count <= self.num_available
        granted = []
        for _ in range(count):
            if not self._free:
                self._evict()
            block_id = self._free.popleft()
            block = self[block_id]
            self._move(block, BlockState.GRANTED)
            block.writer = writer
            block.stamp += 1
            self._write(block_id)
            granted.append(block_id)
        return granted

    def commit(self, block_id: int, name: BlockName | None) -> None:
        """A granted block is final, with one reader. The first block of a key answers for it; one
        without a name is never found."""
        block = self[block_id]
        assert block.state is BlockState.GRANTED
        self._move(block, BlockState.COMMITTED)
        block.writer, block.num_readers = "", 1
        if name is not None and name.key not in self._index:
            block.name = name
            self._add_name(block_id)
        self._write(block_id)

    def discard(self, block_id: int) -> bool:
        """A committed or cached block is not what its key says: nobody shall find it any more.
        False if it could not be found anyway."""
        block = self[block_id]
        assert block.state in (BlockState.COMMITTED, BlockState.CACHED)
        block.is_corrupt = True
        if block.name is None:
            return False
        self._hide(block_id)
        return True

    def hide_all(self) -> list[int]:
        """Nobody shall find any block any more. Returns those that could be found."""
        found = list(self._index.values())
        for block_id in found:
            self._hide(block_id)
        return found

    def _hide(self, block_id: int) -> None:
        block = self[block_id]
        if block.state is BlockState.CACHED:
            self._cached.remove(block_id)
            self._set_free(block_id)
        else:
            self._forget_name(block)
        self._write(block_id)

    def coldest(self, count: int) -> list[int]:
        """Cached blocks that are to be evicted soon."""
        return self._cached.coldest(count)

    def hand_on(self, block_id: int, writer: str) -> None:
        """A granted block gets another writer; the first has said that it writes no more, and a
        copy of what it wrote is not what the block will hold."""
        block = self[block_id]
        assert block.state is BlockState.GRANTED
        block.writer = writer
        block.stamp += 1
        self._write(block_id)

    def free(self, block_ids: Iterable[int]) -> None:
        """Granted or quarantined blocks whose writer writes no more become free."""
        for block_id in block_ids:
            assert self[block_id].state in (BlockState.GRANTED, BlockState.QUARANTINED)
            self._set_free(block_id)
            self._write(block_id)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Granted blocks are taken from a writer that may still be writing."""
        for block_id in block_ids:
            block = self[block_id]
            assert block.state is BlockState.GRANTED
            self._move(block, BlockState.QUARANTINED)

    def blame(self, block_ids: Iterable[int], writer: str) -> None:
        """Quarantined blocks wait for another writer from now on."""
        for block_id in block_ids:
            assert self[block_id].state is BlockState.QUARANTINED
            self[block_id].writer = writer

    def restore(self, blocks: Sequence[Block]) -> None:
        """Begin with these blocks, all new until now. None of them is cached yet: those with a name
        are read."""
        for block_id, block in enumerate(blocks):
            self._move(self[block_id], block.state)
            self._blocks[block_id] = block
            self._add_name(block_id)
        self._free = deque(each for each in self._free if self[each].state is BlockState.FREE)

    def written_by(self, writer: str) -> list[int]:
        """The blocks that `writer` was granted, or that are quarantined because of it."""
        return [block_id for block_id, block in enumerate(self._blocks) if block.writer == writer]

    def counts(self) -> dict[str, int]:
        """Blocks by state. The values add up to the number of blocks."""
        return {state.value: count for state, count in self._counts.items()}

    def check(self) -> None:
        """Assert that the lists agree with the blocks' states: nothing lost, nothing twice."""
        counts = self.counts()
        for state in BlockState:
            derived = sum(block.state is state for block in self._blocks)
            assert counts[state.value] == derived
        assert len(self._free) == len(set(self._free)) == counts["free"]
        assert len(self._cached) == counts["cached"]
        for block_id in self._free:
            assert self[block_id] == Block(stamp=self[block_id].stamp)
        children: Counter[bytes] = Counter()
        for key, block_id in self._index.items():
            name = self[block_id].name
            assert name is not None
            assert name.key == key
            children[name.parent] += 1
        assert children == self._num_children
        for block in self._blocks:
            assert bool(block.writer) == (
                block.state in (BlockState.GRANTED, BlockState.QUARANTINED)
            )
            assert (block.num_readers > 0) == (block.state is BlockState.COMMITTED)

    def _move(self, block: Block, state: BlockState) -> None:
        self._counts[block.state] -= 1
        self._counts[state] += 1
        block.state = state

    def _evict(self) -> None:
        """The journal hears of the grant that follows: until then the block is as it was."""
        self._set_free(self._cached.victim(self._is_leaf))
        self.num_evicted += 1

    def _is_leaf(self, block_id: int) -> bool:
        """Whether no indexed block builds on this one: without it they could not be found."""
        name = self[block_id].name
        return name is None or name.key not in self._num_children

    def _set_free(self, block_id: int) -> None:
        block = self[block_id]
        self._forget_name(block)
        self._move(block, BlockState.FREE)
        block.writer, block.num_readers, block.is_corrupt = "", 0, False
        self._free.append(block_id)

    def _write(self, block_id: int) -> None:
        if self._journal is not None:
            self._journal.write(block_id, self[block_id])

    def _add_name(self, block_id: int) -> None:
        name = self[block_id].name
        if name is not None:
            self._index[name.key] = block_id
            self._num_children[name.parent] = self._num_children.get(name.parent, 0) + 1
            self.num_indexed += 1

    def _forget_name(self, block: Block) -> None:
        name = block.name
        if name is None:
            return
        block.name = None
        del self._index[name.key]
        self._num_children[name.parent] -= 1
        if not self._num_children[name.parent]:
            del self._num_children[name.parent]
