"""Who waits for room in the arena, and how much is promised to whom. Pure.

Room is promised before work begins: an open handoff holds a reservation for its whole prompt, and
`growth_blocks` are kept back for sequences that are already running. A handoff that goes on from
another stands first in the line, and has what was computed pinned all the while: unless nobody else
can make room.
"""

from __future__ import annotations

from collections import deque

from services.kvstore.blocks import BlockPool
from services.kvstore.handoff import OVER, Handoff, HandoffState

_STANDS_STILL = (HandoffState.WAITING, *OVER)


class Room:
    """The blocks of one store as promises, and the line of handoffs that wait for one."""

    def __init__(
        self, pool: BlockPool, block_size: int, *, growth_blocks: int, prefix_cache: bool
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.handoffs: dict[str, Handoff] = {}
        self.num_reserved = 0
        self._waiting: deque[Handoff] = deque()
        self._preparing: dict[str, Handoff] = {}  # not in the line yet
        self._no_room: tuple[int | str, ...] | None = None  # where admitting ended
        self._growth_blocks = growth_blocks
        self._prefix_cache = prefix_cache

    def line_up(self, handoff_id: str) -> None:
        """A new handoff is prepared to wait for room, if it is not over."""
        handoff = self._preparing.pop(handoff_id, None)
        if handoff is None:
            return
        if handoff.epoch > 1:
            self._waiting.appendleft(handoff)
        else:
            self._waiting.append(handoff)

    def admit(self) -> list[Handoff]:
        """Reserve room for waiting handoffs, in order, as far as it reaches; returns those.

        The first in line blocks the rest: letting small ones pass would starve the large.
        """
        admitted: list[Handoff] = []
        if self._room() == self._no_room:
            return admitted  # asked after every message, and looking up a long prompt costs
        while self._waiting and (self._reserve(self._waiting[0]) or self._make_room()):
            if self._waiting[0].state is HandoffState.RESERVED:
                admitted.append(self._waiting.popleft())
        self._no_room = self._room()
        return admitted

    def _room(self) -> tuple[int | str, ...]:
        """All that decides whether the first in line can be admitted."""
        if not self._waiting:
            return ()
        return (
            self._waiting[0].handoff_id,
            self.pool.num_available,
            self.pool.num_indexed,
            self.num_reserved,
            self._num_open(),
            len(self._can_give()),
        )

    def usable_keys(self, handoff: Handoff) -> list[bytes]:
        """The keys of the prompt's blocks that need no computing if they are found."""
        if not self._prefix_cache:
            return []
        # The last position is always computed: its logits are what the first token is drawn from.
        return handoff.keys[: (handoff.num_tokens - 1) // self.block_size]

    @property
    def room(self) -> int:
        """Blocks that are promised to nobody; may be negative only within an operation."""
        return self.pool.num_available - self.num_reserved

    def _reserve(self, handoff: Handoff) -> bool:
        keys = self.usable_keys(handoff)[handoff.num_committed :]
        cached = self.pool.lookup(keys)
        needed = self._blocks_for(handoff.num_tokens) - handoff.num_committed - len(cached)
        room = self.room - self.pool.num_cached(cached)
        # With nothing else open the growth reserve has nobody to serve.
        kept_back = self._growth_blocks if self._num_open() else 0
        if needed + kept_back > room:
            return False
        self.pool.pin(cached)
        handoff.blocks += cached
        handoff.num_committed = handoff.num_cached = len(handoff.blocks)
        handoff.num_reserved = needed
        self.num_reserved += needed
        handoff.state = HandoffState.RESERVED
        return True

    def _make_room(self) -> bool:
        """Others that stand still give up what they hold for the first in line. False if none has
        anything, or room may come by somebody's progress."""
        can_give = self._can_give()
        for handoff in can_give:
            handoff.drop_blocks(self.pool)
        return bool(can_give)

    def _can_give(self) -> list[Handoff]:
        """Who holds blocks that nobody writes, if nobody's progress can make room."""
        if any(handoff.state not in _STANDS_STILL for handoff in self.handoffs.values()):
            return []
        return [
            handoff
            for handoff in self.handoffs.values()
            if handoff.blocks and handoff is not self._waiting[0] and not handoff.writer
        ]

    @property
    def num_waiting(self) -> int:
        """Handoffs that wait for room, or for blocks from the disk."""
        return len(self._waiting) + len(self._preparing)

    def _num_open(self) -> int:
        return len(self.handoffs) - self.num_waiting

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _leave_line(self, handoff: Handoff) -> None:
        was_preparing = self._preparing.pop(handoff.handoff_id, None) is not None
        if handoff.state is HandoffState.WAITING and not was_preparing:
            self._waiting.remove(handoff)
