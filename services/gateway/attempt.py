"""One try at serving a request at one place, from opening its handoff to its last token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from common.kv.hashing import prompt_keys, root_key, tenant_tag
from common.messages import (
    HandoffOpened,
    OpenHandoff,
    OutputToken,
    Prefill,
    Reserve,
)
from kvbaton.errors import KvbatonError
from services.gateway.peers import Store, Worker
from services.gateway.stream import RequestStream

R = TypeVar("R", Reserve, Prefill)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is served. Colocated, `prefill` is `decode`."""

    store: Store
    prefill: Worker
    decode: Worker


class Attempt:
    """`outcome` becomes None after the last token, else it says why this could not go on."""

    def __init__(self, stream: RequestStream, place: Place, after: str = "") -> None:
        """`after`: the handoff that the request had at this store before."""
        self.stream = stream
        self.place = place
        self.handoff_id = ""
        self.after = after
        self.outcome: asyncio.Future[KvbatonError | None]
        self.outcome = asyncio.get_running_loop().create_future()
        self._tokens = [*stream.request.prompt, *stream.tokens]
        self._num_before = len(stream.tokens)
        self._num_looked_at = -1
        self._num_to_prefill = len(self._tokens)
        self._prefill_id = place.prefill.member_ids[place.store.index]
        self._decode_id = place.decode.member_ids[place.store.index]
        secret, request = place.store.welcome.cache_secret, stream.request
        fingerprint = place.decode.member.fingerprint
        self._root_key = root_key(secret, request.tenant, fingerprint, request.cache_salt)
        self._tenant = tenant_tag(secret, request.tenant)
        stream.restart()
        for worker in dict.fromkeys((place.prefill, place.decode)):
            worker.num_assigned += 1
            worker.num_placed += 1
        place.prefill.num_tokens_assigned += self._num_to_prefill

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

    def prefilled(self) -> None:
        """The prompt is computed: prefill has done its part."""
        if self._num_to_prefill:
            self.place.prefill.num_tokens_assigned -= self._num_to_prefill
            self._num_to_prefill = 0
            if self.place.prefill is not self.place.decode:
                self.place.prefill.num_assigned -= 1

    def close(self) -> None:
        """Give back what is counted at the workers."""
        self.prefilled()
        self.place.decode.num_assigned -= 1

    @property
    def left(self) -> str:
        """The handoff that this attempt leaves to the next, or to be ended; "" if it finished or
        has none."""
        return "" if self.has_finished else self.handoff_id or self.after

    @property
    def has_finished(self) -> bool:
        """Whether the last token has come."""
        return self.outcome.done() and self.outcome.result() is None

    def open_message(self, block_size: int) -> OpenHandoff:
        """Asks the store for room; the tenant's keys are its own."""
        return OpenHandoff(
            request_id=self.stream.request_id,
            prefill_id=self._prefill_id,
            decode_id=self._decode_id,
            tenant=self._tenant,
            root_key=self._root_key,
            keys=prompt_keys(self._root_key, self._tokens, block_size),
            num_tokens=len(self._tokens),
            after=self.after,
        )

    async def start(self, opened: HandoffOpened) -> None:
        """Take a place at decode, then have the prompt computed. Raises what they answer."""
        place = self.place
        colocated = place.prefill is place.decode
        reserve = self._request(Reserve, opened, self._decode_id)
        if opened.is_whole:
            self.prefilled()
            *reserve.tokens, reserve.first_token = self._tokens
        else:
            reserve.prefill_here = colocated
        await place.decode.link.call(reserve, timeout_s=None)
        if not colocated and not opened.is_whole:
            await place.prefill.link.call(self._request(Prefill, opened, self._prefill_id))

    def _request(self, kind: type[R], opened: HandoffOpened, worker_id: str) -> R:
        request = self.stream.request
        return kind(
            handoff_id=opened.handoff_id,
            epoch=opened.epoch,
            worker_id=worker_id,
            store=self.place.store.index,
            root_key=self._root_key,
            tokens=self._tokens,
            num_prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            choice=request.choice,
        )

    def on_token(self, worker: Worker, token: OutputToken, now: float) -> None:
        """A token of this request, from either worker. None counts once the attempt has failed:
        the store may have been told, and have given the blocks to another."""
        if self.outcome.done():
            return
        timeline = self.stream.timeline
        self.prefilled()
        timeline.first_token_at = timeline.first_token_at or now
        timeline.prefilled_at = timeline.prefilled_at or now
        if worker is self.place.decode and token.since_joined_ms:
            timeline.handed_over_at = now - token.since_joined_ms / 1000
        if self.stream.deliver(token):
            timeline.finished_at = now
            self.outcome.set_result(None)
