"""The dispatcher: places each request, follows it, and places it again where a worker fails it.

The life of a request here:
1. A face submits it. Where the wait would be too long it is refused at once, and so it is without
   a live worker of each role, unless one may only be restarting.
2. Placement chooses store, prefill and decode worker by least expected wait.
3. `open` at the store: the answer comes when the whole prompt has room. `reserve` at decode: when
   it has a place. Only then is `prefill` asked to compute.
4. Tokens come from prefill (the first) and decode (the rest), each with its index; they are put in
   order, and what came twice is dropped.
5. If a worker is lost, drains or refuses, the request is placed again, after the tokens it has and
   from the handoff it had: the store passes on what was computed. Without anyone to place it at, it
   waits until somebody comes back.
6. At the last token, at a cancel or deadline, or when it cannot go on, what it holds is given back.
"""

from __future__ import annotations

import asyncio

import structlog
from prometheus_client import Counter, Gauge

from common.messages import (
    Aborted,
    AbortHandoff,
    Dropped,
    HandoffOpened,
    Load,
    OutputTokens,
    StaleError,
)
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
from kvbaton.traceparent import trace_id
from services.gateway.backend import GenerationRequest
from services.gateway.observe.request_metrics import RequestMetrics
from services.gateway.observe.watch import Watch
from services.gateway.routing import predictions
from services.gateway.routing.admission import Admission
from services.gateway.routing.assignment import Place
from services.gateway.routing.attempt import Attempt
from services.gateway.routing.chooser import Chooser, Routing
from services.gateway.routing.fleet import Fleet, FleetEvents
from services.gateway.routing.peers import Store, Worker
from services.gateway.routing.placer import Placer
from services.gateway.routing.stream import RequestStream

log = structlog.get_logger()

_MAX_FRUITLESS = 8  # attempts in a row that brought no token
_PAUSES_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0)  # between those: trouble needs a moment
_GRACE_S = 5.0  # new requests wait as well while what is missing may be restarting
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
        routing: Routing,
        admission: Admission,
        max_outage_s: float,
        watch: Watch | None = None,
    ) -> None:
        """`max_outage_s`: how long a request that was placed waits for workers or a store."""
        self.metrics = RequestMetrics(routing.targets_of)
        self.watch = watch or Watch(seams.clock)
        self._clock = seams.clock
        self._rng = seams.rng
        self._tasks = tasks
        self._admission = admission
        self._max_outage_s = max_outage_s
        self._attempts: dict[Attempt, None] = {}  # in the order they began
        self._by_handoff: dict[str, Attempt] = {}
        self._left: set[str] = set()  # handoffs of attempts that failed, to go on from
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        events = FleetEvents(
            on_tokens=self._on_tokens,
            on_dropped=self._on_dropped,
            on_aborted=self._on_aborted,
            on_worker_lost=self._on_worker_lost,
            on_store_silent=self._on_store_silent,
            on_store_forgot=self._on_store_forgot,
            on_news=lambda: self._placer.on_news(),  # noqa: PLW0108 - it is made of the fleet
            load=self._load,
        )
        self.fleet = Fleet(seams, tasks, name, stores, events)
        self._chooser = Chooser(self.fleet, seams.clock, routing)
        self._placer = Placer(self._chooser, seams.clock)

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
        return not self._is_draining and self._placer.is_ready

    def submit(self, request: GenerationRequest) -> RequestStream:
        if self._is_draining:
            raise UnavailableError("this gateway is shutting down", retry_after_s=1)
        if self._placer.unready_s > _GRACE_S:
            raise self._chooser.unavailable()
        now = self._clock.now()
        stream = RequestStream(request, now)
        self._placer.check_target(stream)
        self._admission.take(stream, len(request.prompt), now, is_new=not request.resumed)
        self._idle.clear()
        _RUNNING.inc()
        self.metrics.taken(stream)
        self.watch.begun(stream)
        stream.task = self._tasks.spawn(self._serve(stream), "request")
        stream.task.add_done_callback(lambda _: self._served(stream))
        return stream

    def stats(self) -> dict[str, float]:
        return {"requests_running": self._admission.num_requests} | self.fleet.stats()

    def _load(self) -> Load:
        return Load(
            num_running=self.metrics.num_running,
            num_waiting=self.metrics.num_waiting,
            is_draining=self._is_draining,
        )

    def _served(self, stream: RequestStream) -> None:
        self._admission.end(stream, self._clock.now())
        self._placer.ended(stream)
        self.watch.ended(stream)
        if not self._admission.num_requests:
            self._idle.set()
        _RUNNING.dec()

    # ---- a request ------------------------------------------------------------------------------

    async def _serve(self, stream: RequestStream) -> None:
        names = {"request": stream.request_id, "trace": trace_id(stream.timeline.traceparent)}
        structlog.contextvars.bind_contextvars(**{k: v for k, v in names.items() if v})
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
            self.metrics.ended(stream, outcome)
            if outcome == "finished":
                predictions.check(stream)
            log.info(
                "request_ended",
                outcome=outcome,
                num_tokens=len(stream.tokens),
                num_attempts=stream.timeline.num_attempts,
            )

    async def _try_to_serve(self, stream: RequestStream) -> KvbatonError | None:
        """Attempts, until one ends well or none can. Returns why not, or None."""
        attempt: Attempt | None = None
        tried: set[Worker] = set()
        num_fruitless = 0
        try:
            while True:
                if stream.awaits_prompt_logprobs:
                    stream.cache_salt = self._rng.new_id()
                patience_s = _GRACE_S if attempt is None else self._max_outage_s
                place = await self._placer.wait(stream, tried, patience_s)
                attempt = self._next_attempt(attempt, stream, place)
                num_tokens = len(stream.tokens)
                error = await self._attempt(attempt)
                if not isinstance(error, _RETRYABLE):
                    return error
                attempt.times.failure = error.message
                log.info("attempt_failed", reason=error.message)
                if len(stream.tokens) > num_tokens:
                    num_fruitless = 0
                    tried.clear()
                tried |= {place.prefill, place.decode}
                num_fruitless += 1
                if num_fruitless >= _MAX_FRUITLESS:
                    return _given_up(error)
                await asyncio.sleep(_PAUSES_S[num_fruitless - 1])
        except UnavailableError as unavailable:
            return unavailable
        finally:
            if attempt is not None:
                self._abandon(attempt)

    def _next_attempt(self, former: Attempt | None, stream: RequestStream, place: Place) -> Attempt:
        """The request goes on from the handoff it had, unless it goes to another store."""
        stream.timeline.num_attempts += 1
        if former is None:
            return Attempt(stream, place)
        _RETRIED.inc()
        if former.place.store is place.store and not stream.awaits_prompt_logprobs:
            return Attempt(stream, place, after=former.left)
        self._abandon(former)
        return Attempt(stream, place)

    def _abandon(self, attempt: Attempt) -> None:
        """Nothing of it counts any more, unless it finished."""
        if attempt.left:
            self._left.discard(attempt.left)
            attempt.place.store.link.send(AbortHandoff(handoff_id=attempt.left))

    async def _attempt(self, attempt: Attempt) -> KvbatonError | None:
        """Serve the request at its place. Returns why it could not be finished there, or None."""
        _PLACED.inc()
        stream, place = attempt.stream, attempt.place
        attempt.begin(self._chooser.routing.targets_of(stream.request), self._clock.now())
        self._placer.let_in()
        self._attempts[attempt] = None
        try:
            opened = await self._open(attempt)
            attempt.opened(opened)
            self._left.discard(attempt.after)
            self._by_handoff[opened.handoff_id] = attempt
            layout = place.decode.member.layout
            assert layout is not None
            stream.opened(opened.num_cached_blocks * layout.block_size)
            attempt.times.opened(opened, layout.block_size, self._clock.now())
            await attempt.start(opened, self._clock.now())
            attempt.times.started_at = self._clock.now()
            num_loaded = attempt.times.num_loaded_tokens
            self.metrics.placed(stream, num_loaded, attempt.times.started_at)
            await first_of(attempt.outcome)  # awaiting it itself would cancel it with us
            return attempt.outcome.result()
        except KvbatonError as error:
            return error
        finally:
            attempt.times.ended_at = self._clock.now()
            del self._attempts[attempt]
            self._by_handoff.pop(attempt.handoff_id, None)
            if attempt.left:
                self._left.add(attempt.left)
            attempt.close(self._clock.now())
            self._placer.let_in()

    async def _open(self, attempt: Attempt) -> HandoffOpened:
        """Open a handoff. If we give up while it waits for room, the store is told so."""
        link, message = attempt.place.store.link, attempt.open_message()
        try:
            opened = await link.call(message, timeout_s=None)
        except asyncio.CancelledError:
            link.send(AbortHandoff(open_call_id=message.call_id))
            raise
        assert isinstance(opened, HandoffOpened)
        return opened

    # ---- what the fleet tells -------------------------------------------------------------------

    def _on_tokens(self, worker: Worker, message: OutputTokens) -> None:
        now = self._clock.now()
        came: list[tuple[RequestStream, int]] = []
        for token in message.tokens:
            attempt = self._by_handoff.get(token.handoff_id)
            if attempt is not None:
                stream = attempt.stream
                num_before = len(stream.tokens)
                attempt.on_token(worker, token, now)
                came.append((stream, len(stream.tokens) - num_before))
                self._admission.first_token(stream, now)
        self.metrics.tokens(came, now)
        self._placer.let_in()

    def _on_dropped(self, message: Dropped) -> None:
        attempt = self._by_handoff.get(message.handoff_id)
        if attempt is not None:
            attempt.fail(error_from_wire(message.code, message.message, message.field, 1))

    def _on_aborted(self, message: Aborted) -> bool:
        if message.handoff_id in self._left:
            return True
        attempt = self._by_handoff.get(message.handoff_id)
        if attempt is None or attempt.has_finished:
            return False
        attempt.fail(UnavailableError(message.reason, retry_after_s=1))
        return True

    def _on_worker_lost(self, worker: Worker) -> None:
        for attempt in self._attempts:
            if attempt.uses(worker):
                attempt.fail(UnavailableError(f"{worker.member.name} is gone", retry_after_s=1))

    def _on_store_silent(self, store: Store) -> None:
        """What gets no further without it goes on elsewhere, if it can."""
        can_go = any(self._chooser.has_workers(each) for each in self.fleet.stores)
        for attempt in self._attempts:
            if attempt.place.store is store and attempt.is_stuck() and can_go:
                attempt.fail(UnavailableError("the KV store cannot be reached", retry_after_s=1))

    def _on_store_forgot(self, store: Store) -> None:
        for attempt in self._attempts:
            if attempt.place.store is store:
                attempt.fail(UnavailableError("the KV store forgot us", retry_after_s=1))


def _given_up(last: KvbatonError) -> KvbatonError:
    if isinstance(last, OverloadedError):
        return last
    return UnavailableError(
        f"given up after {_MAX_FRUITLESS} attempts without a token; the last: {last.message}"
    )
