"""The line of requests that no worker has begun with: by priority, fairly between tenants, and of a
tenant the one that is due first. One that would miss its target for the first token even if it
began now lets those pass that need not: else one burst makes all that come after it late. Pure.

Tenants are served by virtual counters of the tokens each was given (Sheng et al., "Fairness in
Serving Large Language Models", 2024): the one with the fewest is next, and one that comes back is
lifted to the others', so nobody saves up a turn. Every eighth turn is that of whoever waits
longest, whatever its priority: so nobody starves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

_OLDEST_EVERY = 8  # turns
_MOST_TENANTS = 4096  # whose counters are kept though they do not wait

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Entry:
    priority: int
    tenant: str
    num_tokens: int
    takes_s: float
    begins_by: float  # or it misses its target


class Line(Generic[T]):
    """Who waits, and how much each tenant was given."""

    def __init__(self) -> None:
        self._entries: dict[T, _Entry] = {}  # the oldest first
        # Whether it is too late, when it is due, a number. They may hold who left.
        self._heaps: dict[tuple[int, str], list[tuple[bool, float, int, T]]] = {}
        self._waiting: Counter[str] = Counter()  # requests, by tenant
        self._given: dict[str, float] = {}  # tokens, by tenant
        self._floor = 0.0  # what a tenant that comes back counts as given
        self._num_turns = 0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        item: T,
        *,
        priority: int,
        tenant: str,
        num_tokens: int,
        takes_s: float,
        due_at: float,
        has_target: bool,
    ) -> None:
        """Stand in the line. `num_tokens` are what it will be given, which takes `takes_s`.
        `has_target`: it is of no use to have it later than `due_at`."""
        self._given[tenant] = max(self._given.get(tenant, 0.0), self._floor)
        begins_by = due_at - takes_s if has_target else math.inf
        self._entries[item] = _Entry(priority, tenant, num_tokens, takes_s, begins_by)
        self._waiting[tenant] += 1
        self._num_added += 1
        heap = self._heaps.setdefault((priority, tenant), [])
        heappush(heap, (False, due_at, self._num_added, item))

    def remove(self, item: T) -> None:
        """It waits no more; nothing happens if it did not."""
        entry = self._entries.pop(item, None)
        if entry is not None:
            self._waiting[entry.tenant] -= 1
            if not self._waiting[entry.tenant]:
                del self._waiting[entry.tenant]

    def take(self, now: float) -> T:
        """Whose turn it is; the line must not be empty."""
        self._num_turns += 1
        item = next(iter(self._entries))
        if self._num_turns % _OLDEST_EVERY:
            self._tidy(now)
            lowest = min(priority for priority, _ in self._heaps)
            heaps = [key for key in self._heaps if key[0] == lowest]
            chosen = min(heaps, key=lambda key: (self._given[key[1]], self._heaps[key][0]))
            *_, item = heappop(self._heaps[chosen])
        entry = self._entries[item]
        self._floor = max(self._floor, min(self._given[tenant] for tenant in self._waiting))
        self.remove(item)
        self._given[entry.tenant] += entry.num_tokens
        if len(self._given) > _MOST_TENANTS:
            self._given = {
                tenant: given
                for tenant, given in self._given.items()
                if given > self._floor or tenant in self._waiting
            }
        return item

    def charge(self, tenant: str, num_tokens: int) -> None:
        """A tenant was given tokens. What it is given while it does not wait costs nobody."""
        if tenant in self._waiting:
            self._given[tenant] += num_tokens

    def ahead_s(self, tenant: str) -> float:
        """How long what a new request of the tenant finds before it takes, about: what all have
        there, or as much of each tenant's as of its own."""
        total_s = own_s = 0.0
        tenants = {tenant}
        for entry in self._entries.values():
            total_s += entry.takes_s
            own_s += entry.takes_s if entry.tenant == tenant else 0.0
            tenants.add(entry.tenant)
        return min(total_s, own_s * len(tenants) + (total_s / max(1, len(self._entries))))

    def _tidy(self, now: float) -> None:
        """Every heap begins with somebody who waits, and is in time if anybody there is."""
        for key, heap in list(self._heaps.items()):
            while heap:
                is_late, due_at, number, item = heap[0]
                entry = self._entries.get(item)
                if entry is None:
                    heappop(heap)
                elif not is_late and entry.begins_by < now:
                    heapreplace(heap, (True, due_at, number, item))
                else:
                    break
            if not heap:
                del self._heaps[key]
