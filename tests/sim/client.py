"""One request of a client of the simulated cluster, across as many gateways as it takes.

What a msgpack client does when a gateway is lost is kvbaton/resume.py, the client's own; a client
that is not `is_resumable` speaks HTTP: it has one gateway, and fails with it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from kvbaton.errors import ConnectionLostError, KvbatonError
from kvbaton.protocol import (
    Accepted,
    Done,
    Generate,
    Resume,
    Timings,
    Token,
    Tokens,
    Usage,
    client_message_decoder,
)
from kvbaton.resume import RESUME_S, ResumableRequest
from kvbaton.session import Event
from services.gateway.backend import GenerationRequest
from tests.sim.cluster import SimCluster
from tests.sim.gateway import SimGateway
from tests.sim.loop import virtual_loop

PING_S = 1.0
_LOOK_S = 0.05  # for a gateway
_NO_USAGE = Usage(num_prompt_tokens=0, num_output_tokens=0, num_cached_tokens=0)
_DECODER = client_message_decoder()


class Call:
    """`tokens` is what the client has been given, `error` why it gets no more."""

    def __init__(
        self,
        cluster: SimCluster,
        message: Generate,
        *,
        rng: random.Random,
        is_resumable: bool,
        heard: Callable[[str], None],
    ) -> None:
        """`heard(request_id)` is called with each new token."""
        self.request_id = f"request-{message.id}"
        self.tokens: list[int] = []
        self.error: KvbatonError | None = None
        self.was_admitted = False
        self.gateway: SimGateway | None = None
        self.is_resumable = is_resumable
        self.num_gateways = 0
        self.broken = ""
        self._request = ResumableRequest(message, self._take)
        self._cluster = cluster
        self._rng = rng
        self._heard = heard
        self._was_silent = False
        self._limit = asyncio.timeout(None)

    async def run(self) -> None:
        """Until it is over. Whoever cancels this gives the request up."""
        while not self._request.is_over:
            gateway = self._choose()
            if gateway is not None:
                await self._ask(gateway)
            if not self._request.is_over:
                self._be_patient()
                await asyncio.sleep(self._pause_s() if gateway is not None else _LOOK_S)

    def _be_patient(self) -> None:
        now = virtual_loop().time()
        self._request.lost(now)
        if now >= self._request.give_up_at(RESUME_S):
            self._request.give_up(now, "no gateway")

    def _pause_s(self) -> float:
        """It goes on at once the first time, then later each time, as in gateways.py."""
        num_before = self._request.num_failures - 2
        most_s: float = min(0.05 * 2 ** min(num_before, 10), 1.0) if num_before >= 0 else 0.0
        return most_s * self._rng.uniform(0.5, 1)

    def ping(self) -> None:
        """A gateway that answers no second one is lost."""
        if self.gateway is None or not self.is_resumable:
            return
        is_silent = virtual_loop().is_stopped(self.gateway.seams.pid)
        if is_silent and self._was_silent:
            self._limit.reschedule(virtual_loop().time())
        self._was_silent = is_silent

    def _choose(self) -> SimGateway | None:
        """Another one than the last, if there is one."""
        live = self._cluster.gateways
        others = [each for each in live if each is not self.gateway] or live
        return self._rng.choice(others) if others else None

    async def _ask(self, gateway: SimGateway) -> None:
        message = _DECODER.decode(self._request.encoded(virtual_loop().time()))
        assert isinstance(message, Generate)
        self.gateway, self._was_silent = gateway, False
        self.num_gateways += 1
        try:
            await self._serve(gateway, message)
        except TimeoutError:
            self._fail(ConnectionLostError("the gateway is silent"))
        except KvbatonError as error:
            self._fail(error)

    async def _serve(self, gateway: SimGateway, message: Generate) -> None:
        assert message.token_ids is not None
        begun = message.resume or Resume(request_id=self.request_id, seed=message.id)
        request = GenerationRequest(
            request_id=begun.request_id,
            prompt=message.token_ids,
            sampling=message.sampling,
            deadline_s=None if message.deadline_ms is None else message.deadline_ms / 1000,
            resumed=tuple(begun.tokens),
        )
        stream = self._cluster.give(gateway, request)
        try:
            async with asyncio.timeout(None) as self._limit:
                self._hear(Accepted(id=message.id, request_id=begun.request_id, seed=begun.seed))
                index = len(begun.tokens)
                async for event in stream:
                    if event.index != index:
                        self.broken = f"token {event.index} came where {index} was due"
                    index += 1
                    token, reason = Token(index=event.index, token_id=event.token_id), None
                    reason = event.finish_reason
                    self._hear(Tokens(id=message.id, tokens=[token], finish_reason=reason))
                    if reason is not None:
                        break
                self._hear(
                    Done(
                        id=message.id,
                        finish_reason=reason or "",
                        usage=_NO_USAGE,
                        timings=Timings(),
                    )
                )
        finally:
            # Until it has a place it may be refused, as one that comes when nobody is there.
            self.was_admitted |= stream.timeline.num_attempts > 0
            # A gateway that is stopped learns of it when it goes on.
            context = self._cluster.world.context(gateway.seams.pid)
            virtual_loop().call_soon(stream.cancel, context=context)

    def _fail(self, error: KvbatonError) -> None:
        if self.is_resumable:
            self._hear(error)
        else:
            self._request.end(error)

    def _hear(self, event: Event) -> None:
        self._request.take(event, virtual_loop().time())

    def _take(self, event: Event) -> None:
        """What the client's own code passes on."""
        if isinstance(event, Tokens):
            self.tokens += [token.token_id for token in event.tokens]
            self._heard(self.request_id)
        elif isinstance(event, KvbatonError):
            self.error = event
