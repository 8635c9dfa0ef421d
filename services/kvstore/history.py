"""The last transitions of a store's handoffs and blocks, for whoever asks why. Pure.

Noting one costs about a microsecond; asking walks through all that is remembered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple


def goes_by(handoff_id: str, request_id: str, names: Container[str]) -> bool:
    """Whether one of the names means this handoff of this request. The requests of one answer, such
    as `name` and `name#1`, go by `name` together."""
    answer_id = request_id.rpartition("#")[0]
    return any(each and each in names for each in (handoff_id, request_id, answer_id))


class Event(NamedTuple):
    """One transition. `stamps` are those of the `blocks`, in the same order; what does not belong
    to the transition is empty."""

    seq: int
    at: float
    name: str
    handoff_id: str
    request_id: str
    member_id: str
    blocks: tuple[int, ...]
    stamps: tuple[int, ...]
    detail: str


class History:
    """A ring of events: at most `max_events`, which name at most `max_blocks` blocks in all."""

    def __init__(
        self,
        now: Callable[[], float] = lambda: 0.0,
        *,
        max_events: int = 50_000,
        max_blocks: int = 500_000,
    ) -> None:
        self.num_noted = 0
        self._now = now
        self._max_events = max_events
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._events: deque[Event] = deque()

    def note(
        self,
        name: str,
        handoff_id: str = "",
        request_id: str = "",
        member_id: str = "",
        *,
        blocks: Sequence[int] = (),
        stamps: Sequence[int] = (),
        detail: str = "",
    ) -> None:
        """A transition has just taken place."""
        self.num_noted += 1
        events = self._events
        events.append(
            Event(
                self.num_noted,
                self._now(),
                name,
                handoff_id,
                request_id,
                member_id,
                tuple(blocks),
                tuple(stamps),
                detail,
            )
        )
        self._num_blocks += len(blocks)
        while len(events) > self._max_events or self._num_blocks > self._max_blocks:
            self._num_blocks -= len(events.popleft().blocks)

    @property
    def num_forgotten(self) -> int:
        """Events that are remembered no more."""
        return self.num_noted - len(self._events)

    def of_block(self, block: int) -> list[Event]:
        """What happened to a block, oldest first."""
        return [event for event in self._events if block in event.blocks]

    def of_requests(self, names: Sequence[str]) -> list[Event]:
        """What happened to handoffs, or to all handoffs of requests, oldest first."""
        wanted = frozenset(names)
        return [
            event for event in self._events if goes_by(event.handoff_id, event.request_id, wanted)
        ]

    def opened_at(self) -> dict[str, float]:
        """When each handoff was first heard of, as far as that is remembered."""
        opened: dict[str, float] = {}
        for event in self._events:
            opened.setdefault(event.handoff_id, event.at)
        return opened
