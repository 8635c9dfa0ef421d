"""One try at serving a request at one place, from opening its handoff to its last token."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec

from common.kv.hashing import tenant_tag
from common.messages import (
    HandoffOpened,
    OpenHandoff,
    OutputToken,
    Prefill,
    Reserve,
)
from kvbaton.errors import KvbatonError
from services.gateway.backend import Targets
from services.gateway.observe.timeline import AttemptTimes
from services.gateway.routing.assignment import Assignment, Place
from services.gateway.routing.peers import Worker
from services.gateway.routing.stream import RequestStream

R = TypeVar("R", Reserve, Prefill)


class Attempt:
    """`outcome` becomes None after the last token, else it says why this could not go on."""

    def __init__(self, stream: RequestStream, place: Place, after: str = "") -> None:
        """`after`: the handoff that the request had at this store before."""
        self.stream = stream
        self.place = place
        self.times: AttemptTimes  # from when it is begun
        self.handoff_id = ""
        self.after = after
        self.outcome: asyncio.Future[KvbatonError | None]
        self.outcome = asyncio.get_running_loop().create_future()
        self._targets: Targets  # from when it is begun, as the next
        self._assignment: Assignment
        self._tokens = place.tokens
        # What has come of the prompt's log-probabilities is not computed again.
        self._sampling = stream.request.sampling
        if not stream.awaits_prompt_logprobs:
            self._sampling = msgspec.structs.replace(self._sampling, prompt_logprobs=None)
        self._num_before = len(stream.tokens)
        self._num_looked_at = -1
        self._prefill_id = place.prefill.member_ids[place.store.index]
        self._decode_id = place.decode.member_ids[place.store.index]
        self._tenant = tenant_tag(place.store.welcome.cache_secret, stream.request.tenant)
        stream.restart()

    def uses(self, worker: Worker) -> bool:
        """Whether this still needs the worker."""
        awaits_first = len(self.stream.tokens) == self._num_before
        return worker is self.place.decode or (worker is self.place.prefill and awaits_first)

    def is_stuck(self) -> bool:
        """Whether no token has come since this was asked before."""
        before, self._num_looked_at = self._num_looked_at, len(self.stream.tokens)
        return before == self._num_looked_at

    def fail(self, error: KvbatonError) -> None:
        """This attempt is over; the request may not be."""
        if not self.outcome.done():
            self.outcome.set_result(error)

    def opened(self, opened: HandoffOpened) -> None:
        """The store has the handoff."""
        self.handoff_id = opened.handoff_id
        self._assignment.opened(opened.num_cached_blocks)

    def close(self, now: float) -> None:
        """Give back what is counted at the workers."""
        self._assignment.close(now)

    @property
    def left(self) -> str:
        """The handoff that this attempt leaves to the next, or to be ended; "" if it finished or
        has none."""
        return "" if self.has_finished else self.handoff_id or self.after

    @property
    def has_finished(self) -> bool:
        """Whether the last token has come."""
        return self.outcome.done() and self.outcome.result() is None

    def open_message(self) -> OpenHandoff:
        """Asks the store for room; the tenant's keys are its own."""
        return OpenHandoff(
            request_id=self.stream.request_id,
            prefill_id=self._prefill_id,
            decode_id=self._decode_id,
            tenant=self._tenant,
            root_key=self.place.root_key,
            keys=self.place.keys,
            num_tokens=len(self._tokens),
            after=self.after,
            traceparent=self.stream.timeline.traceparent,
        )

    def begin(self, targets: Targets, now: float) -> None:
        """The attempt begins."""
        self._targets = targets
        self._assignment = Assignment(self.place, targets, now)
        timeline, place = self.stream.timeline, self.place
        timeline.prefill_worker = place.prefill.member.name
        timeline.decode_worker = place.decode.member.name
        self.times = timeline.attempts.begin(
            timeline.num_attempts,
            now,
            timeline.prefill_worker,
            timeline.decode_worker,
            self.stream.placement,
        )

    async def start(self, opened: HandoffOpened, now: float) -> None:
        """Take a place at decode, then have the prompt computed. Raises what they answer."""
        place = self.place
        colocated = place.prefill is place.decode
        reserve = self._request(Reserve, opened, self._decode_id, now)
        reserve.tpot_target_ms = self._targets.tpot_ms
        if opened.is_whole:
            self._assignment.prefilled(now)
            *reserve.tokens, reserve.first_token = self._tokens
        else:
            reserve.prefill_here = colocated
        await place.decode.link.call(reserve, timeout_s=None)
        if not colocated and not opened.is_whole:
            await place.prefill.link.call(self._request(Prefill, opened, self._prefill_id, now))

    def _request(self, kind: type[R], opened: HandoffOpened, worker_id: str, now: float) -> R:
        request = self.stream.request
        return kind(
            handoff_id=opened.handoff_id,
            epoch=opened.epoch,
            worker_id=worker_id,
            store=self.place.store.index,
            root_key=self.place.root_key,
            tokens=self._tokens,
            num_prompt_tokens=len(request.prompt),
            sampling=self._sampling,
            choice=request.choice,
            ttft_left_ms=self._ttft_left_ms(now),
            request_id=request.request_id,
            traceparent=self.stream.timeline.traceparent,
        )

    def _ttft_left_ms(self, now: float) -> float:
        target_ms = self._targets.ttft_ms
        if self.stream.tokens or not target_ms:
            return 0.0
        return max(0.0, target_ms - 1000 * (now - self.stream.timeline.received_at))

    def on_token(self, worker: Worker, token: OutputToken, now: float) -> None:
        """A token of this request, from either worker. None counts once the attempt has failed:
        the store may have been told, and have given the blocks to another."""
        if self.outcome.done():
            return
        timeline = self.stream.timeline
        if len(self.stream.tokens) == self._num_before:
            self._assignment.prefilled(now)
        timeline.first_token_at = timeline.first_token_at or now
        timeline.prefilled_at = timeline.prefilled_at or now
        is_decode = worker is self.place.decode
        if token.report is not None:
            self.times.heard(token.report, now, by_decode=is_decode)
            if is_decode:
                timeline.handed_over_at = now - token.report.joined_ms / 1000
        if self.stream.awaits_prompt_logprobs and token.index == self._num_before:
            try:
                self.stream.take_scores(token.prompt_scores)
            except ValueError as error:
                self.fail(KvbatonError(f"the prompt's log-probabilities are not whole: {error}"))
                return
        if self.stream.deliver(token, worker.member.name):
            timeline.finished_at = now
            self._assignment.finished(self.stream.tokens[self._num_before :])
            self.outcome.set_result(None)
