"""How a decode worker that is to leave hands its sequences on: whole, with nothing to recompute."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.messages import Yield
from common.worker.runtime import WorkerRuntime
from common.worker.sequence import Sequence
from kvbaton.errors import KvbatonError
from services.decode.places import Places
from services.decode.scheduler import DecodeScheduler

log = structlog.get_logger()

_REASON = "the worker is shutting down"


class Departure:
    """What runs is yielded to the store between two steps; what has not begun is given up; what is
    being computed, here or by prefill, is yielded once it has been."""

    def __init__(
        self,
        runtime: WorkerRuntime,
        scheduler: DecodeScheduler,
        places: Places,
        sequences: Callable[[], list[Sequence]],
    ) -> None:
        self._runtime = runtime
        self._scheduler = scheduler
        self._places = places
        self._sequences = sequences
        self._yielding: set[Sequence] = set()

    def hand_on(self) -> None:
        """To be called between steps, as often as there may be something to hand on."""
        for sequence in self._sequences():
            if self._scheduler.is_running(sequence):
                self._scheduler.remove(sequence)
                self._yielding.add(sequence)
                self._runtime.tasks.spawn(self._yield(sequence), "yield")
            elif not self._is_under_way(sequence):
                self._runtime.endings.drop(sequence, "unavailable", _REASON)

    def _is_under_way(self, sequence: Sequence) -> bool:
        if sequence in self._yielding or sequence.num_uses:
            return True
        if sequence in self._scheduler:
            return sequence.num_computed > sequence.num_found
        return self._places.is_taken(sequence.handoff_id)

    async def _yield(self, sequence: Sequence) -> None:
        runtime = self._runtime
        with runtime.endings.using(sequence):
            try:
                await self._hand_over(sequence)
            except KvbatonError as error:
                log.info("yield_failed", **sequence.names, reason=error.message)
        self._yielding.discard(sequence)
        runtime.endings.drop(sequence, "unavailable", _REASON)

    async def _hand_over(self, sequence: Sequence) -> None:
        """All that is computed, the unfinished block too. The store refuses it if the sequence was
        ended meanwhile."""
        runtime = self._runtime
        await runtime.publisher.settle(sequence)
        store = runtime.store_of(sequence)
        first, num_tokens = sequence.num_committed, sequence.num_computed
        end = -(-num_tokens // runtime.block_size)
        rest = sequence.blocks[first:end]
        await store.mover.push(
            sequence.handoff_id, sequence.epoch, sequence.pieces(first, rest, [])
        )
        message = Yield(
            handoff_id=sequence.handoff_id,
            epoch=sequence.epoch,
            num_tokens=num_tokens,
            blocks=rest,
        )
        await store.link.call(message)
        del sequence.blocks[first:end]
