"""Which blocks a store holds, and which workers have a copy of their own, as far as one gateway can
tell from the requests it placed. Pure.

It asks nobody: a question before each placement would cost a round trip, and the answer would be
old when the handoff opens. What `open` found corrects it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

_MAX_BLOCKS = 1 << 17


class PrefixIndex:
    """The blocks of one store by key, least recently used first, each with a set of workers: bits
    of an integer, as there are many blocks and few workers."""

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        self._max_blocks = max_blocks

    def __len__(self) -> int:
        return len(self._holders)

    def num_found(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks the store is expected to have."""
        return next((i for i, key in enumerate(keys) if key not in self._holders), len(keys))

    def num_held(self, keys: Sequence[bytes], workers: Iterable[int]) -> dict[int, int]:
        """How many of these blocks, which the store has, each worker has before its first gap."""
        bits = {worker: 1 << worker for worker in workers}
        counts = dict.fromkeys(bits, len(keys))
        for index, key in enumerate(keys):
            holders = self._holders.get(key, 0)
            for worker in [worker for worker, bit in bits.items() if not holders & bit]:
                counts[worker] = index
                del bits[worker]
            if not bits:
                break
        return counts

    def opened(self, keys: Sequence[bytes], num_cached: int) -> None:
        """A handoff found so many of its leading blocks."""
        self.add(keys[:num_cached], ())
        for key in keys[num_cached:]:
            self._holders.pop(key, None)

    def add(self, keys: Sequence[bytes], workers: Iterable[int]) -> None:
        """The store has these blocks; these workers have them too."""
        added = sum(1 << worker for worker in set(workers))
        # From the end: what is used least recently is a prompt's tail, not what others share.
        for key in reversed(keys):
            self._holders[key] = self._holders.get(key, 0) | added
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def forget_worker(self, worker: int) -> None:
        """The worker is gone, and its copies with it."""
        kept = ~(1 << worker)
        for key, holders in self._holders.items():
            self._holders[key] = holders & kept
