"""How sequences end: at once for planning; for the store when nothing uses their blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from common.messages import Dropped, Message, Quit
from common.worker.role import Role
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink

log = structlog.get_logger()


class Endings:
    """Counts the uses of each sequence's blocks: steps, moves, calls.

    While there are any, the store is not told that the sequence is over, so it gives the blocks to
    nobody else.

    `answer(gateway, message)` sends to a gateway, `store_of(sequence)` is where its blocks are.
    """

    def __init__(
        self,
        role: Role,
        answer: Callable[[bytes, Message], None],
        store_of: Callable[[Sequence], StoreLink],
    ) -> None:
        self.removed = asyncio.Event()  # set whenever a sequence is forgotten
        self._role = role
        self._answer = answer
        self._store_of = store_of

    def drop(self, sequence: Sequence, code: str, reason: str, *, field: str | None = None) -> None:
        """Give a sequence up and tell its gateway, which may place it again."""
        if sequence.is_over:
            return
        log.info("sequence_dropped", **sequence.names, code=code, reason=reason)
        dropped = Dropped(handoff_id=sequence.handoff_id, code=code, message=reason, field=field)
        self._answer(sequence.gateway, dropped)
        self.abort(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence that is not finished, or whose end the store does not wait for."""
        quits = Quit(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
        if sequence.ending is not None:
            sequence.ending = quits  # what was to be said would be refused, and nothing follow it
        self.end(sequence, quits)

    def end(self, sequence: Sequence, message: Message) -> None:
        """The sequence is over; `message` tells the store once nothing uses its blocks."""
        if sequence.is_over:
            return
        sequence.is_over, sequence.ending = True, message
        self._role.stop(sequence)
        self._settle(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Something begins to use the sequence's blocks. Each hold needs a release."""
        sequence.num_uses += 1

    def release(self, sequence: Sequence) -> None:
        """The other end of `hold`."""
        sequence.num_uses -= 1
        self._settle(sequence)

    @contextmanager
    def using(self, sequence: Sequence) -> Iterator[None]:
        """Hold the sequence for a while."""
        self.hold(sequence)
        try:
            yield
        finally:
            self.release(sequence)

    def _settle(self, sequence: Sequence) -> None:
        ending = sequence.ending
        if ending is None or sequence.num_uses:
            return
        sequence.ending = None
        self._role.remove(sequence)
        self.removed.set()
        store = self._store_of(sequence)
        if store.member_id == sequence.incarnation:
            store.mover.forget(sequence.blocks)
            store.link.send(ending)
