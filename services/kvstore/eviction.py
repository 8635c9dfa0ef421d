"""Which cached block goes first. Pure.

Each use earns a block a lifetime, the distance after which blocks of this workload are usually used
again, and it is kept for as long after its last use. What was used once goes first, a prefix that
many share stays, and nothing stays for ever. Blocks that are gone are remembered for a while by
their keys, so that one that comes back has not lost what it earned.

A tenant that holds more than its share of the cache pays for what it adds: the others' blocks are
spared for some turns of the cache. A lone tenant may have all of it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

_MOST_USES = 8  # that count
_LEARNING_RATE = 1e-3  # how much one reuse moves the usual reuse distance
_MOST_REPRIEVES = 7  # since the last use
_MOST_PASSED_OVER = 64  # to find one victim
_LEAST_HISTORY = 32_768
_HISTORY_PER_BLOCK = 2


class Order(Protocol):
    """An order of eviction of cached blocks, which are those that nobody reads."""

    def __len__(self) -> int:
        """The blocks in it."""

    def add(
        self, block: int, tenant: bytes, *, key: bytes | None = None, cold: bool = False
    ) -> None:
        """A block has lost its last reader. `key`: what it holds, for ever. `cold`: it was not
        used, only written to disk or the like, and goes back to where it was."""

    def remove(self, block: int) -> None:
        """A block has a reader again, or shall not be found any more."""

    def victim(self, is_leaf: Callable[[int], bool]) -> int:
        """Remove the block to evict next: a leaf, if there is one among the coldest. There must be
        a block."""

    def coldest(self, count: int) -> list[int]:
        """About those that the next calls of `victim` would give, coldest first."""


@dataclass(slots=True)
class _Cached:
    key: bytes | None
    tenant: bytes
    num_uses: int
    used_at: int
    placed_at: int  # the last use, or a reprieve after it
    num_reprieves: int = 0


class EvictionOrder:
    """The order that the store uses. All operations take constant time, but for `coldest`.

    Time is the number of uses so far. The blocks of one number of uses stand in one queue in the
    order of their last uses, so the next to go is always the head of a queue.
    """

    def __init__(self, num_blocks: int, *, tenant_share: float = 0.5) -> None:
        """`num_blocks`: of the arena. `tenant_share`: how much of what is cached a tenant may hold
        before the others' blocks are spared, above 0 and at most 1."""
        assert 0 < tenant_share <= 1
        self._cached: dict[int, _Cached] = {}
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(_MOST_USES)]
        self._num_cached: dict[bytes, int] = {}  # of each tenant that has any
        self._largest = b""  # the tenant that held most when it last added a block
        self._tenant_share = tenant_share
        self._now = 0
        self._reuse_distance = float(num_blocks)
        self._history = _History(max(_LEAST_HISTORY, _HISTORY_PER_BLOCK * num_blocks))

    def __len__(self) -> int:
        return len(self._cached)

    def add(
        self, block: int, tenant: bytes, *, key: bytes | None = None, cold: bool = False
    ) -> None:
        """See Order."""
        assert block not in self._cached
        self._now += not cold
        num_uses, used_at = self._history.pop(key) or (0, self._now)
        if cold:
            num_uses = max(num_uses, 1)
        else:
            if num_uses:
                distance = self._now - used_at
                self._reuse_distance += (distance - self._reuse_distance) * _LEARNING_RATE
            num_uses, used_at = min(num_uses + 1, _MOST_USES), self._now
        cached = _Cached(key, tenant, num_uses, used_at, placed_at=used_at)
        queue = self._queues[num_uses - 1]
        if cold and queue:
            cached.placed_at = min(used_at, self._cached[next(iter(queue))].placed_at)
        self._cached[block] = cached
        queue[block] = None
        if cold:
            queue.move_to_end(block, last=False)
        self._num_cached[tenant] = self._num_cached.get(tenant, 0) + 1
        if self._num_cached[tenant] > self._num_cached.get(self._largest, 0):
            self._largest = tenant

    def remove(self, block: int) -> None:
        """See Order."""
        cached = self._cached.pop(block)
        del self._queues[cached.num_uses - 1][block]
        self._num_cached[cached.tenant] -= 1
        if not self._num_cached[cached.tenant]:
            del self._num_cached[cached.tenant]
        self._history.put(cached.key, (cached.num_uses, cached.used_at))

    def victim(self, is_leaf: Callable[[int], bool]) -> int:
        """See Order. Others that are passed over go behind those of as many uses."""
        first_leaf = None
        passed_over: list[int] = []  # out of their queues, so that none is looked at twice
        for _ in range(min(_MOST_PASSED_OVER, len(self))):
            block = self._head()
            cached = self._cached[block]
            if is_leaf(block):
                if not self._is_spared(cached):
                    break
                first_leaf = block if first_leaf is None else first_leaf
                cached.num_reprieves += 1
            del self._queues[cached.num_uses - 1][block]
            passed_over.append(block)
        else:
            block = passed_over[0] if first_leaf is None else first_leaf
        for other in passed_over:
            cached = self._cached[other]
            cached.placed_at = self._now
            self._queues[cached.num_uses - 1][other] = None
        self.remove(block)
        return block

    def coldest(self, count: int) -> list[int]:
        """See Order."""
        by_expiry = heapq.merge(*map(self._by_expiry, range(_MOST_USES)))
        blocks = (block for _, block in islice(by_expiry, count + _MOST_PASSED_OVER))
        exposed = (block for block in blocks if not self._is_spared(self._cached[block]))
        return list(islice(exposed, count))

    def _head(self) -> int:
        """The block whose lifetime ends first."""
        best, first = -1, 0.0
        earned = 0.0
        for queue in self._queues:
            if queue:
                block = next(iter(queue))
                expiry = self._cached[block].placed_at + earned
                if best < 0 or expiry < first:
                    best, first = block, expiry
            earned += self._reuse_distance
        return best

    def _by_expiry(self, place: int) -> Iterator[tuple[float, int]]:
        earned = place * self._reuse_distance
        for block in self._queues[place]:
            yield self._cached[block].placed_at + earned, block

    def _is_spared(self, cached: _Cached) -> bool:
        """Whether another tenant holds more than its share, and the block was not spared too
        often since its last use."""
        if cached.tenant == self._largest or cached.num_reprieves >= _MOST_REPRIEVES:
            return False
        most = self._tenant_share * len(self)
        return self._num_cached.get(self._largest, 0) > most >= self._num_cached[cached.tenant]


class _History:
    """Uses of blocks by key: at least the last `size` that were put, at most twice as many."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._newer: dict[bytes, tuple[int, int]] = {}
        self._older: dict[bytes, tuple[int, int]] = {}

    def put(self, key: bytes | None, uses: tuple[int, int]) -> None:
        """Remember the number of uses and the time of the last."""
        if key is None:
            return
        self._newer[key] = uses
        if len(self._newer) >= self._size:
            self._older, self._newer = self._newer, {}

    def pop(self, key: bytes | None) -> tuple[int, int] | None:
        """Take out what is remembered."""
        if key is None:
            return None
        return self._newer.pop(key, None) or self._older.pop(key, None)
