"""The dispatcher: places each request, follows it, and places it again where a worker fails it.

The life of a request here:
1. A face submits it. Without a live worker of each role it is refused at once.
2. Placement chooses store, prefill and decode worker by least expected wait.
3. `open` at the store: the answer comes when the whole prompt has room. `reserve` at decode: when
   it has a place. Only then is `prefill` asked to compute.
4. Tokens come from prefill (the first) and decode (the rest), each with its index; they are put in
   order, and what came twice is dropped.
5. If a worker is lost, drains or refuses, the request is placed again, after the tokens it has.
6. At the last token, at a cancel or deadline, or when it cannot go on, what it holds is given back.
"""

from __future__ import annotations

import asyncio

import structlog
from prometheus_client import Counter, Gauge

from common.messages import Aborted, AbortHandoff, Dropped, HandoffOpened, OutputTokens, StaleError
from common.metrics import REGISTRY
from common.service import Seams, Tasks, first_of
from kvbaton.errors import (
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    UnavailableError,
    error_from_wire,
)
from services.gateway.attempt import Attempt, Place
from services.gateway.backend import GenerationRequest
from services.gateway.fleet import Fleet, FleetEvents, Placeable, Store, Worker
from services.gateway.placement import (
    choose_colocated,
    choose_decode,
    choose_prefill,
    choose_shard,
)
from services.gateway.stream import RequestStream

log = structlog.get_logger()

_MAX_ATTEMPTS = 5
_RETRY_PAUSE_S = 0.1  # longer after each attempt but the first: a cluster in trouble needs a moment
_RETRYABLE = (UnavailableError, ConnectionLostError, StaleError, OverloadedError)

_PLACED = Counter("kvbaton_requests_placed_total", "Attempts placed", registry=REGISTRY)
_RETRIED = Counter("kvbaton_requests_retried_total", "Attempts after the first", registry=REGISTRY)
_FINISHED = Counter(
    "kvbaton_requests_finished_total", "Requests by outcome", ["outcome"], registry=REGISTRY
)
_RUNNING = Gauge("kvbaton_requests_running", "Requests in flight", registry=REGISTRY)


class Dispatcher:
    """Implements backend.Backend over a fleet of workers."""

    def __init__(
        self,
        seams: Seams,
        tasks: Tasks,
        *,
        name: str,
        stores: list[str],
        mode: str,
        max_requests: int,
    ) -> None:
        self._clock = seams.clock
        self._tasks = tasks
        self._mode = mode
        self._max_requests = max_requests
        self._attempts: dict[Attempt, None] = {}  # in the order they began
        self._by_handoff: dict[str, Attempt] = {}
        self._num_requests = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        events = FleetEvents(
            on_tokens=self._on_tokens,
            on_dropped=self._on_dropped,
            on_aborted=self._on_aborted,
            on_worker_lost=self._on_worker_lost,
            on_store_lost=self._on_store_lost,
        )
        self.fleet = Fleet(seams, tasks, name, stores, events)

    async def drain(self) -> None:
        """Refuse new requests, and wait until those in flight have ended."""
        self._is_draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Close every connection; requests in flight must have ended."""
        self.fleet.close()

    # ---- backend.Backend ------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int | None:
        lengths = [worker.member.max_model_len for worker in self.fleet.workers.values()]
        return min(lengths, default=None)

    @property
    def ready(self) -> bool:
        return not self._is_draining and any(
            self._has_workers(store) for store in self.fleet.stores
        )

    def submit(self, request: GenerationRequest) -> RequestStream:
        if not self.ready:
            raise self._unavailable()
        if self._num_requests >= self._max_requests:
            raise OverloadedError(
                f"this gateway already serves {self._max_requests} requests", retry_after_s=1
            )
        stream = RequestStream(request, self._clock.now())
        self._num_requests += 1
        self._idle.clear()
        _RUNNING.inc()
        stream.task = self._tasks.spawn(self._serve(stream), "request")
        stream.task.add_done_callback(lambda _: self._served())
        return stream

    def stats(self) -> dict[str, float]:
        stats: dict[str, float] = {"requests_running": self._num_requests}
        for role in ("prefill", "decode"):
            workers = [w for w in self.fleet.workers.values() if w.member.role == role]
            stats[f"{role}_workers"] = len(workers)
            stats[f"{role}_sequences_running"] = sum(w.load.num_running for w in workers)
            stats[f"{role}_sequences_waiting"] = sum(w.load.num_waiting for w in workers)
            stats[f"{role}_tokens_queued"] = sum(w.load.num_tokens_queued for w in workers)
        for store in self.fleet.stores:
            for state, count in store.blocks.items():
                stats[f"kv_blocks_{state}"] = stats.get(f"kv_blocks_{state}", 0) + count
        stats["handoffs"] = sum(store.num_handoffs for store in self.fleet.stores)
        stats["handoffs_waiting"] = sum(store.num_waiting for store in self.fleet.stores)
        return stats

    def _served(self) -> None:
        self._num_requests -= 1
        if not self._num_requests:
            self._idle.set()
        _RUNNING.dec()

    # ---- a request ------------------------------------------------------------------------------

    async def _serve(self, stream: RequestStream) -> None:
        deadline_s = stream.request.deadline_s
        timer = None
        if deadline_s is not None:
            late = DeadlineError(f"the deadline of {deadline_s:g} s has passed")
            timer = asyncio.get_running_loop().call_later(deadline_s, stream.give_up, late)
        outcome = "cancelled"
        try:
            error = await self._try_to_serve(stream)
            outcome = "finished" if error is None else error.code
            if error is not None:
                stream.fail(error)
        finally:
            if timer is not None:
                timer.cancel()
            _FINISHED.labels(outcome).inc()
            log.info(
                "request_ended",
                request=stream.request_id,
                outcome=outcome,
                num_tokens=len(stream.tokens),
                num_attempts=stream.timeline.num_attempts,
            )

    async def _try_to_serve(self, stream: RequestStream) -> KvbatonError | None:
        """Attempts, until one ends well or none can. Returns why not, or None."""
        tried: set[Worker] = set()
        error: KvbatonError | None = None
        for number in range(1, _MAX_ATTEMPTS + 1):
            stream.timeline.num_attempts = number
            try:
                place = self._place(stream, tried)
            except UnavailableError as unavailable:
                if number == 1:
                    return unavailable
                error = unavailable  # who was there may come back in a moment
            else:
                if number > 1:
                    _RETRIED.inc()
                tried |= {place.prefill, place.decode}
                error = await self._attempt(Attempt(stream, place))
                if not isinstance(error, _RETRYABLE):
                    return error
            log.info("attempt_failed", request=stream.request_id, reason=error.message)
            await asyncio.sleep(_RETRY_PAUSE_S * (number - 1))
        if isinstance(error, OverloadedError):
            return error
        reason = error.message if error else ""
        return UnavailableError(f"given up after {_MAX_ATTEMPTS} attempts; the last: {reason}")

    async def _attempt(self, attempt: Attempt) -> KvbatonError | None:
        """Serve the request at its place. Returns why it could not be finished there, or None."""
        _PLACED.inc()
        stream, place = attempt.stream, attempt.place
        stream.timeline.prefill_worker = place.prefill.member.name
        stream.timeline.decode_worker = place.decode.member.name
        self._attempts[attempt] = None
        try:
            opened = await self._open(attempt)
            attempt.handoff_id = opened.handoff_id
            self._by_handoff[opened.handoff_id] = attempt
            layout = place.decode.member.layout
            assert layout is not None
            stream.opened(opened.num_cached_blocks * layout.block_size)
            await attempt.start(opened)
            stream.timeline.placed_at = stream.timeline.placed_at or self._clock.now()
            await first_of(attempt.outcome)  # awaiting it itself would cancel it with us
            return attempt.outcome.result()
        except KvbatonError as error:
            return error
        finally:
            del self._attempts[attempt]
            self._by_handoff.pop(attempt.handoff_id, None)
            attempt.close()

    async def _open(self, attempt: Attempt) -> HandoffOpened:
        """Open a handoff. If we give up while it waits for room, the store is told so."""
        member, link = attempt.place.decode.member, attempt.place.store.link
        assert member.layout is not None
        message = attempt.open_message(member.layout.block_size)
        try:
            opened = await link.call(message, timeout_s=None)
        except asyncio.CancelledError:
            link.send(AbortHandoff(open_call_id=message.call_id))
            raise
        assert isinstance(opened, HandoffOpened)
        return opened

    # ---- placement ------------------------------------------------------------------------------

    def _has_workers(self, store: Store) -> bool:
        roles = ("decode",) if self._mode == "colocated" else ("prefill", "decode")
        return store.is_up and all(self.fleet.of_role(role, store) for role in roles)

    def _unavailable(self) -> UnavailableError:
        if self._is_draining:
            return UnavailableError("this gateway is shutting down", retry_after_s=1)
        for store in self.fleet.stores:
            if not store.is_up:
                return UnavailableError("the KV store cannot be reached", retry_after_s=1)
        roles = [w.member.role for w in self.fleet.workers.values()]
        missing = "decode" if "decode" not in roles else "prefill"
        return UnavailableError(f"no {missing} worker is alive", retry_after_s=1)

    def _place(self, stream: RequestStream, tried: set[Worker]) -> Place:
        """Raises UnavailableError without a worker of each role. Workers in `tried` come last."""
        stores = [store for store in self.fleet.stores if self._has_workers(store)]
        if not stores:
            raise self._unavailable()
        layout = self.fleet.of_role("decode", stores[0])[0].member.layout
        assert layout is not None
        first_block = stream.request.prompt[: layout.block_size]
        store = self.fleet.stores[choose_shard(first_block, [store.index for store in stores])]
        num_tokens = len(stream.request.prompt) + len(stream.tokens)
        decodes = self._candidates("decode", store, tried)
        if self._mode == "colocated":
            worker = choose_colocated(decodes, num_tokens).worker
            return Place(store, worker, worker)
        prefill = choose_prefill(self._candidates("prefill", store, tried), num_tokens)
        return Place(store, prefill.worker, choose_decode(decodes).worker)

    def _candidates(self, role: str, store: Store, tried: set[Worker]) -> list[Placeable]:
        workers = self.fleet.of_role(role, store)
        fresh = [worker for worker in workers if worker not in tried]
        return [worker.candidate() for worker in fresh or workers]

    # ---- what the fleet tells -------------------------------------------------------------------

    def _on_tokens(self, worker: Worker, message: OutputTokens) -> None:
        now = self._clock.now()
        for token in message.tokens:
            attempt = self._by_handoff.get(token.handoff_id)
            if attempt is not None:
                attempt.on_token(worker, token, now)

    def _on_dropped(self, message: Dropped) -> None:
        attempt = self._by_handoff.get(message.handoff_id)
        if attempt is not None:
            attempt.fail(error_from_wire(message.code, message.message, None, 1))

    def _on_aborted(self, message: Aborted) -> None:
        attempt = self._by_handoff.get(message.handoff_id)
        if attempt is not None:
            attempt.fail(UnavailableError(message.reason, retry_after_s=1))

    def _on_worker_lost(self, worker: Worker) -> None:
        for attempt in self._attempts:
            if attempt.uses(worker):
                attempt.fail(UnavailableError(f"{worker.member.name} is gone", retry_after_s=1))

    def _on_store_lost(self, store: Store) -> None:
        for attempt in self._attempts:
            if attempt.place.store is store:
                attempt.fail(UnavailableError("the KV store is gone", retry_after_s=1))
