"""Free blocks that a decode worker holds in advance, so that growth needs no round trip. Pure."""

from __future__ import annotations

from collections import deque


class BlockLease:
    """Spare blocks of one store. `starved` once the store had none left to give."""

    def __init__(self) -> None:
        self._spare: deque[int] = deque()
        self.asking = False
        self.starved = False

    def __len__(self) -> int:
        return len(self._spare)

    def blocks(self) -> list[int]:
        """The spare blocks."""
        return list(self._spare)

    def take(self) -> int | None:
        """A spare block, or None."""
        return self._spare.popleft() if self._spare else None

    def add(self, blocks: list[int]) -> None:
        """Blocks that are ours and unused: newly leased, or left over from a sequence."""
        self._spare.extend(blocks)
        if blocks:
            self.starved = False

    def num_wanted(self, num_running: int) -> int:
        """How many to ask the store for now; 0 while an answer is due, or would be none."""
        if self.asking or self.starved or num_running == 0:
            return 0
        target = max(2, num_running // 4)
        return max(0, target - len(self._spare))

    def surplus(self, num_running: int) -> list[int]:
        """Spare blocks that others could use: all when nothing runs, else what exceeds the need."""
        keep = max(4, num_running // 2) if num_running else 0
        surplus = []
        while len(self._spare) > keep:
            surplus.append(self._spare.pop())
        return surplus

    def clear(self) -> None:
        """The store has forgotten us: nothing here is ours any more."""
        self._spare.clear()
        self.asking = self.starved = False
