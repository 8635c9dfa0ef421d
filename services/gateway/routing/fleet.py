"""The cluster as a gateway sees it: links to every store and worker, and what each reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from common.log import change_log_level
from common.messages import (
    INTERNAL_VERSION,
    Aborted,
    AbortHandoff,
    Dropped,
    FromStore,
    FromWorker,
    HandoffOpened,
    Heartbeat,
    Hello,
    Leave,
    Load,
    Member,
    Members,
    Message,
    OutputTokens,
    SetLogLevel,
    Welcome,
    decoder,
)
from common.net.link import Link
from common.net.transport import TransportError
from common.service import Seams, Tasks
from kvbaton.errors import ConnectionLostError, KvbatonError
from kvbaton.version import VERSION
from services.gateway.routing.peers import Store, Worker

log = structlog.get_logger()

_HEARTBEATS_MISSED = 3
_WORKER_BEAT_S = 2.0


@dataclass(frozen=True, slots=True)
class FleetEvents:
    """Whom the fleet tells what it hears."""

    on_tokens: Callable[[Worker, OutputTokens], None]
    on_dropped: Callable[[Dropped], None]
    on_aborted: Callable[[Aborted], bool]  # whether the request goes on from there
    on_worker_lost: Callable[[Worker], None]
    on_store_silent: Callable[[Store], None]  # said at each heartbeat it does not answer
    on_store_forgot: Callable[[Store], None]  # it has ended what it had for us
    on_news: Callable[[], None]  # who can take work has changed
    load: Callable[[], Load]  # our own, for operators


class Fleet:
    """Connections of one gateway. Membership is the stores': workers come and go as they say."""

    def __init__(
        self, seams: Seams, tasks: Tasks, name: str, endpoints: list[str], events: FleetEvents
    ) -> None:
        self.workers: dict[str, Worker] = {}  # by endpoint
        self.has_store = asyncio.Event()  # one has welcomed us, since the start
        self._num_met = 0
        self._seams = seams
        self._tasks = tasks
        self._events = events
        self._name = name
        self.stores = [Store(index) for index in range(len(endpoints))]
        for store, endpoint in zip(self.stores, endpoints, strict=True):
            self._connect(store, endpoint)
            tasks.spawn(self._beat(store), f"heartbeat-{store.index}")

    def of_role(self, role: str, store: Store) -> list[Worker]:
        """Workers of a role that have joined the store and take new work."""
        return [
            worker
            for worker in self.workers.values()
            if worker.member.role == role
            and store.index in worker.member_ids
            and not worker.load.is_draining
            and not worker.is_lost
        ]

    def stats(self) -> dict[str, float]:
        """Sums over all workers and stores."""
        stats: dict[str, float] = {}
        for role in ("prefill", "decode"):
            workers = [worker for worker in self.workers.values() if worker.member.role == role]
            stats[f"{role}_workers"] = len(workers)
            stats[f"{role}_sequences_running"] = sum(w.load.num_running for w in workers)
            stats[f"{role}_sequences_waiting"] = sum(w.load.num_waiting for w in workers)
            stats[f"{role}_tokens_queued"] = sum(w.load.num_tokens_queued for w in workers)
        for store in self.stores:
            for state, count in store.blocks.items():
                stats[f"kv_blocks_{state}"] = stats.get(f"kv_blocks_{state}", 0) + count
        stats["handoffs"] = sum(store.num_handoffs for store in self.stores)
        stats["handoffs_waiting"] = sum(store.num_waiting for store in self.stores)
        return stats

    def close(self) -> None:
        for store in self.stores:
            store.link.send(Leave())
            store.link.close()
        for worker in self.workers.values():
            worker.link.close()

    # ---- stores ---------------------------------------------------------------------------------

    def _connect(self, store: Store, endpoint: str) -> None:
        def hello() -> Hello:
            if store.member_id and store.link.is_introduced:
                store.former_ids.add(store.member_id)
            introduction = self._hello()
            store.member_id = introduction.member.member_id
            return introduction

        def welcomed(welcome: Welcome) -> None:
            if welcome.instance_id != store.welcome.instance_id:
                self._forget_members(store)  # it knows nobody yet
            elif store.welcome.instance_id:
                log.warning("store_forgot_us", store=endpoint)
                self._events.on_store_forgot(store)
            store.welcome, store.is_up = welcome, True
            self.has_store.set()
            # What ran for what we were counts no more.
            store.former_ids.say_stopped(store.link, self._tasks)
            log.info("store_joined", store=endpoint)
            self._events.on_news()

        def handle(message: Message) -> None:
            if isinstance(message, Members):
                self._on_members(store, message)
            elif isinstance(message, Aborted):
                if not self._events.on_aborted(message):
                    # We listen no more.
                    store.link.send(AbortHandoff(handoff_id=message.handoff_id))
            elif isinstance(message, HandoffOpened):  # its request was cancelled meanwhile
                store.link.send(AbortHandoff(handoff_id=message.handoff_id))
            elif isinstance(message, SetLogLevel):
                change_log_level(message.level)

        store.link = Link(
            self._seams.transport,
            endpoint,
            decoder(FromStore),
            role="kvstore",
            hello=hello,
            welcomed=welcomed,
            handle=handle,
            refused=_log_refused,
            lost=lambda: self._store_lost(store, "the connection ended"),
        )

    def _hello(self, fingerprint: str = "") -> Hello:
        """To a worker it names the model that the store said it serves."""
        member = Member(
            member_id=self._seams.rng.new_id(),
            role="gateway",
            name=self._name,
            host_id=self._seams.host_id,
            pid=self._seams.pid,
            fingerprint=fingerprint,
            version=VERSION,
        )
        return Hello(internal_version=INTERNAL_VERSION, member=member)

    async def _beat(self, store: Store) -> None:
        while True:
            interval_s = store.welcome.heartbeat_s
            await asyncio.sleep(interval_s)
            try:
                beat = Heartbeat(load=self._events.load())
                await store.link.call(beat, timeout_s=interval_s * _HEARTBEATS_MISSED)
            except ConnectionLostError as error:
                self._store_lost(store, error.message)
                self._events.on_store_silent(store)

    def _store_lost(self, store: Store, reason: str) -> None:
        """Nothing new goes there; what runs at the workers goes on without it for now."""
        if store.is_up:
            log.warning("store_lost", store=store.link.endpoint, reason=reason)
            store.is_up = False
            store.link.reset()  # so that it greets us first when it is back
            self._events.on_news()

    # ---- workers --------------------------------------------------------------------------------

    def _on_members(self, store: Store, message: Members) -> None:
        store.blocks, store.counters = message.blocks, message.counters
        store.handoffs = message.handoffs
        store.num_handoffs, store.num_waiting = message.num_handoffs, message.num_waiting
        listed = {member.endpoint for member in message.members}
        for worker in list(self.workers.values()):
            was_member = store.index in worker.member_ids
            if was_member and worker.member.endpoint not in listed:
                del worker.member_ids[store.index]
                if not worker.member_ids:
                    self._worker_lost(worker)
        for member in message.members:
            try:
                worker = self.workers.get(member.endpoint) or self._worker_joined(member)
            except TransportError as error:
                log.error("worker_unreachable", name=member.name, reason=str(error))
                continue
            worker.joined(store, member.member_id)
            worker.report(member.load, self._seams.clock.now())
            counts = member.counts
            if counts is not None and counts.num_steps >= worker.counts.num_steps:
                worker.counts = counts  # of two stores, one heard of them before the other
        self._events.on_news()

    def _forget_members(self, store: Store) -> None:
        """A store that restarted lists its workers as they come back. Until then they go on."""
        for worker in self.workers.values():
            worker.member_ids.pop(store.index, None)

    async def _beat_worker(self, worker: Worker) -> None:
        """A connection that broke is noticed by the hello that this brings about."""
        while self.workers.get(worker.member.endpoint) is worker:
            await asyncio.sleep(_WORKER_BEAT_S)
            try:
                await worker.link.call(Heartbeat(), timeout_s=_WORKER_BEAT_S)
            except KvbatonError as error:
                log.info("worker_silent", name=worker.member.name, reason=error.message)
                self._look_after(worker)

    def _look_after(self, worker: Worker) -> None:
        """No store will tell that it is lost if none has it as a member."""
        if not worker.member_ids and self.workers.get(worker.member.endpoint) is worker:
            self._worker_lost(worker)

    def _worker_joined(self, member: Member) -> Worker:
        def welcomed(_welcome: Welcome) -> None:
            if worker.is_known:  # it has forgotten us, and with us what it had for us
                self._events.on_worker_lost(worker)
            worker.is_known, worker.is_lost = True, False
            self._events.on_news()

        def lost() -> None:
            # It has ended, or the connection broke and it gives up what it has for us.
            worker.is_lost = True
            self._events.on_worker_lost(worker)
            link.reset()
            self._look_after(worker)

        def handle(message: Message) -> None:
            if isinstance(message, OutputTokens):
                worker.report(message.load, self._seams.clock.now())
                self._events.on_tokens(worker, message)
            elif isinstance(message, Dropped):
                self._events.on_dropped(message)

        link = Link(
            self._seams.transport,
            member.endpoint,
            decoder(FromWorker),
            role=member.role,
            hello=lambda: self._hello(member.fingerprint),
            welcomed=welcomed,
            handle=handle,
            refused=_log_refused,
            lost=lost,
        )
        worker = self.workers[member.endpoint] = Worker(member, link, self._num_met)
        self._num_met += 1
        self._tasks.spawn(self._beat_worker(worker), "worker-heartbeat")
        log.info("worker_joined", name=member.name, role=member.role, endpoint=member.endpoint)
        return worker

    def _worker_lost(self, worker: Worker) -> None:
        log.info("worker_left", name=worker.member.name, endpoint=worker.member.endpoint)
        del self.workers[worker.member.endpoint]
        worker.link.close()
        for store in self.stores:
            store.prefixes.forget_worker(worker.number)
        self._events.on_worker_lost(worker)
        self._events.on_news()


def _log_refused(error: KvbatonError) -> None:
    log.error("hello_refused", reason=error.message)
