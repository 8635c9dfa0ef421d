"""What a restarted store holds back because of the workers of the one before it. Pure.

They may still be at work in the arena, until each has said that it stopped or is dead.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.kvstore.blocks import BlockPool
from services.kvstore.journal import Recovered
from services.kvstore.staging import Staging


class Formers:
    """Gives the pool what was recovered, and frees what is held back when nobody uses it."""

    def __init__(
        self, pool: BlockPool, staging: Staging, recovered: Recovered, worker_ids: Iterable[str]
    ) -> None:
        self._pool = pool
        self._staging = staging
        self._worker_ids = dict.fromkeys(worker_ids)
        self._in_doubt = recovered.in_doubt
        pool.restore(recovered.blocks)
        staging.former = recovered.in_use
        pool.unpin(recovered.unused)

    def stopped(self, worker_id: str) -> None:
        """A worker of the dead store writes and reads no more. What is quarantined because of it
        may be freed after this: what others may use as well waits for another of them by then."""
        if worker_id not in self._worker_ids:
            return
        del self._worker_ids[worker_id]
        if self._worker_ids:
            mine = [each for each in self._in_doubt if self._pool[each].writer == worker_id]
            self._pool.blame(mine, next(iter(self._worker_ids)))
        else:
            self._in_doubt = []
            self._staging.let_former_go()
