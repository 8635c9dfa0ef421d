"""Places in the batch of a decode worker, and the line for them. Pure.

Whoever has a place runs, or will run without needing anyone who waits for a place: a sequence that
must wait for blocks gives its place up. Otherwise those who have places could wait for room that
those in the line hold, for ever.
"""

from __future__ import annotations

from collections import deque


class Places:
    """A bounded number of places, given in the order asked for."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._taken: set[str] = set()
        self._line: deque[str] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    def is_taken(self, handoff_id: str) -> bool:
        """Whether it has a place."""
        return handoff_id in self._taken

    def ask(self, handoff_id: str, *, first: bool = False) -> None:
        """Stand in the line, at its head if it had a place before."""
        if first:
            self._line.appendleft(handoff_id)
        else:
            self._line.append(handoff_id)

    def leave(self, handoff_id: str) -> None:
        """Give up the place, or the stand in the line."""
        self._taken.discard(handoff_id)
        if handoff_id in self._line:
            self._line.remove(handoff_id)

    def give(self) -> list[str]:
        """Give free places to the first in the line; returns who has one now."""
        given = []
        while self._line and len(self._taken) < self._num_places:
            handoff_id = self._line.popleft()
            self._taken.add(handoff_id)
            given.append(handoff_id)
        return given
