"""Each transition is said once: to the log, and to the history that answers `why`."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from services.kvstore.blocks import BlockPool
from services.kvstore.handoff import Handoff
from services.kvstore.history import History

log = structlog.get_logger()

# Where a request comes to this store and goes: the log of every process that it passes names it.
_ENDS = frozenset({"handoff_opened", "handoff_released", "handoff_aborted"})


class Notes:
    """Takes down what happens to the blocks of one pool and to their handoffs."""

    def __init__(self, history: History, pool: BlockPool) -> None:
        self.history = history
        self._pool = pool

    def handoff(
        self,
        name: str,
        handoff: Handoff,
        member_id: str,
        blocks: Sequence[int] = (),
        detail: str = "",
    ) -> None:
        """A handoff has taken a step, by a member."""
        trace = {"trace": handoff.trace_id} if handoff.trace_id else {}
        say = log.info if name in _ENDS else log.debug
        say(name, handoff=handoff.handoff_id, request=handoff.request_id, detail=detail, **trace)
        self.history.note(
            name,
            handoff.handoff_id,
            handoff.request_id,
            member_id,
            blocks=blocks,
            stamps=self._stamps(blocks),
            detail=detail,
        )

    def blocks(
        self, name: str, blocks: Sequence[int], member_id: str = "", handoff: Handoff | None = None
    ) -> None:
        """Something happened to blocks; nothing is noted of none. Too often for the log."""
        if blocks:
            self.history.note(
                name,
                handoff.handoff_id if handoff else "",
                handoff.request_id if handoff else "",
                member_id,
                blocks=blocks,
                stamps=self._stamps(blocks),
            )

    def granted(
        self,
        name: str,
        blocks: Sequence[int],
        num_evicted: int,
        member_id: str,
        handoff: Handoff | None = None,
    ) -> None:
        """Blocks were granted; the last `num_evicted` of them were evicted for it."""
        evicted = blocks[len(blocks) - num_evicted :]
        if evicted:
            stamps = [self._pool[block].stamp - 1 for block in evicted]
            self.history.note("blocks_evicted", blocks=evicted, stamps=stamps)
        self.blocks(name, blocks, member_id, handoff)

    def _stamps(self, blocks: Sequence[int]) -> list[int]:
        return [self._pool[block].stamp for block in blocks]
