"""How a worker comes to a sequence's blocks: the store grants them, what is final is moved here."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.engine.work import Engine
from common.messages import Claim, Discard, Fill, Granted, StaleError
from common.worker.endings import Endings
from common.worker.mover import CorruptPiecesError
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError, UnavailableError

log = structlog.get_logger()


class Taking:
    """Asks stores, and movers. `store_of(sequence)` is where its blocks are."""

    def __init__(
        self, engine: Engine, endings: Endings, store_of: Callable[[Sequence], StoreLink]
    ) -> None:
        self._engine = engine
        self._endings = endings
        self._store_of = store_of

    async def take(self, sequence: Sequence, step: Fill | Claim) -> bool:
        """Ask the store for the sequence's blocks and make those that are final readable here.

        False if the sequence ended over it.
        """
        store = self._store_of(sequence)
        with self._endings.using(sequence):
            try:
                await self._engine.prepare(sequence.sampling)
                # Without a time limit: an answer that nobody waits for would leak what it grants.
                table = await store.link.call(step, timeout_s=None)
                assert isinstance(table, Granted)
                sequence.granted(table)
                store.mover.learn(table.blocks[: len(table.stamps)], table.stamps)
                readable = table.num_committed if isinstance(step, Fill) else len(table.blocks)
                missing = [index for index in range(readable) if index not in sequence.pulled]
                if not sequence.is_over:
                    await self.pull(sequence, [(index, table.blocks[index]) for index in missing])
            except StaleError:
                self._endings.abort(sequence)
            except KvbatonError as error:
                self._endings.drop(sequence, error.code, error.message, field=error.field)
        return not sequence.is_over

    async def pull(self, sequence: Sequence, blocks: list[tuple[int, int]]) -> None:
        """Make final blocks, given with their places, readable here, unless the sequence ends
        meanwhile: the store may then have given its blocks to another. Raises KvbatonError."""
        store = self._store_of(sequence)
        if not store.mover.moves:
            return
        handoff_id, epoch = sequence.handoff_id, sequence.epoch
        pieces = [sequence.piece(index, block) for index, block in blocks]
        try:
            num_moved = await store.mover.pull(
                handoff_id, epoch, pieces, lambda: not sequence.is_over
            )
            sequence.num_moved += num_moved  # others may have moved some meanwhile
        except CorruptPiecesError as error:
            log.error("blocks_corrupt", **sequence.names, indexes=error.indexes)
            store.link.send(Discard(handoff_id=handoff_id, epoch=epoch, indexes=error.indexes))
            raise UnavailableError(error.message) from error
