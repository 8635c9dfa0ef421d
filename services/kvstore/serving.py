"""What a store serves: the blocks of one model in its arena, their ledger, and the disk behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from common.config import StartError
from common.messages import Member, Message
from common.service import Seams, Tasks
from kvbaton.errors import UnavailableError
from services.kvstore.blocks import BlockPool
from services.kvstore.broker import Broker
from services.kvstore.config import StoreConfig
from services.kvstore.disk.tier import DiskTier
from services.kvstore.formers import Formers
from services.kvstore.handoff import Handoff
from services.kvstore.history import History
from services.kvstore.journal import Worker
from services.kvstore.journal_file import Journal, Left
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members
from services.kvstore.tiering import Tiering
from services.kvstore.writers import Writers

log = structlog.get_logger()

_GROWTH_SHARE = 16  # one block in so many is kept back for sequences that already run


def disk_folder(config: StoreConfig) -> str:
    """A folder for each store, so that all may be given the same setting."""
    return str(Path(config.disk_dir) / config.name)


class Serving:
    """One model, from the first worker that brings it until another brings another.

    `send(member_id, message)` queues a message for a member, if it is still there.
    """

    def __init__(
        self,
        worker: Member,
        *,
        config: StoreConfig,
        seams: Seams,
        tasks: Tasks,
        arena: memoryview,
        members: Members,
        writers: Writers,
        send: Callable[[str, Message], None],
        is_damaged: Callable[[int, bytes], bool],
        journal: Journal | None,
        left: Left | None,
    ) -> None:
        """`left`: what a dead store left of this model in the arena."""
        assert worker.layout is not None
        self.layout = worker.layout
        self.fingerprint = worker.fingerprint
        self.num_blocks = config.kv_bytes // self.layout.block_bytes
        self._members = members
        self._writers = writers
        self._journal = journal
        self.ledger = Ledger(
            BlockPool(self.num_blocks, journal=journal),
            self.layout.block_size,
            seams.rng.new_id,
            growth_blocks=max(1, self.num_blocks // _GROWTH_SHARE),
            prefix_cache=config.prefix_cache,
        )
        self.broker = Broker(
            self.ledger,
            send,
            members.role_of,
            self._must_pull,
            load_first=self._load_first,
            forget_stored=self._forget_stored,
            forget_all_stored=self._forget_all_stored,
            history=History(seams.clock.now),
        )
        self._formers: Formers | None = None
        if left is not None:
            worker_ids = [former.member.member_id for former in left.workers]
            ledger = self.ledger
            self._formers = Formers(ledger.pool, ledger.staging, left.recovered, worker_ids)
        self.tiering: Tiering | None = None
        if config.disk_dir:
            self.tiering = self._use_disk(config, seams, tasks, arena, is_damaged)

    def _use_disk(
        self,
        config: StoreConfig,
        seams: Seams,
        tasks: Tasks,
        arena: memoryview,
        is_damaged: Callable[[int, bytes], bool],
    ) -> Tiering | None:
        try:
            tier = DiskTier(
                seams.files,
                disk_folder(config),
                budget_bytes=config.disk_bytes,
                block_bytes=self.layout.block_bytes,
                fingerprint=self.fingerprint,
                clock=seams.clock,
                rng=seams.rng,
            )
        except StartError as error:  # the setting is right for other models
            log.error("disk_tier_unusable", reason=str(error))
            return None
        return Tiering(
            tier,
            self.ledger,
            arena,
            self.layout.block_bytes,
            notes=self.broker.notes,
            is_damaged=is_damaged,
            tasks=tasks,
            prefill_rate=self._members.prefill_rate,
            prepared=self.broker.prepared,
        )

    def end(self) -> None:
        """Serve no more. Raises UnavailableError while anybody may still write the arena."""
        if self.ledger.is_written:
            raise UnavailableError(
                "workers of the former model may still be writing, or its disk", retry_after_s=1
            )
        if self.tiering is not None:
            self.tiering.stop()

    def handle(self, member: Member, message: Message) -> Message | None:
        """A member's message about handoffs. Raises KvbatonError to refuse it."""
        try:
            if member.role == "gateway":
                return self.broker.from_gateway(member.member_id, message)
            return self.broker.from_worker(member.member_id, message)
        finally:
            self.broker.admit()
            if self.tiering is not None:
                self.tiering.look()

    def lose(self, member: Member, reason: str) -> bool:
        """A member is lost. Returns whether anything is held back until it is known to be dead."""
        self.broker.lose(member.member_id, f"{member.name} is lost: {reason}")
        self.broker.lose_writer(member.member_id)
        return self.ledger.waits_for(member.member_id)

    def add_worker(self, worker: Worker) -> None:
        """A member that maps the arena, before it is told where it is. Raises KvbatonError to
        refuse it."""
        if self._journal is not None:
            self._journal.add_worker(worker)

    def stopped(self, member_id: str) -> None:
        """A member is dead, or says that it writes and listens no more."""
        if self._formers is not None:
            self._formers.stopped(member_id)
        self.broker.member_stopped(member_id)
        if self._journal is not None:
            self._journal.forget_worker(member_id)

    def counters(self) -> dict[str, float]:
        """What the gateways show at /metrics."""
        pool = self.ledger.pool
        counters: dict[str, float] = {
            "blocks_indexed_total": pool.num_indexed,
            "blocks_evicted_total": pool.num_evicted,
        }
        if self.tiering is not None:
            stats = self.tiering.tier.stats()
            counters |= {f"disk_{name}": float(value) for name, value in stats.items()}
            counters["disk_is_failing"] = float(stats["is_failing"] or self.tiering.is_overdue)
        return counters

    def _load_first(self, handoff: Handoff) -> bool:
        return self.tiering is not None and self.tiering.load_first(handoff)

    def _forget_stored(self, key: bytes) -> None:
        if self.tiering is not None:
            self.tiering.tier.forget(key)

    def _forget_all_stored(self) -> None:
        if self.tiering is not None:
            self.tiering.tier.forget_all()

    @property
    def num_corrupt(self) -> int:
        """Blocks that were dropped here: in the arena, on the disk, or by a worker they came to."""
        num_corrupt = self.broker.num_corrupt
        if self.tiering is not None:
            num_corrupt += self.tiering.num_damaged + self.tiering.tier.num_corrupt
        return num_corrupt

    def _must_pull(self, member_id: str) -> bool:
        member = self._members.get(member_id)
        return member is not None and not self._writers.may_write(member)
