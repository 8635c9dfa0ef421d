"""The wait until a request has its turn, and somebody who can serve it."""

from __future__ import annotations

import asyncio
import contextlib
import math

from common.seams import Clock
from common.service import first_of
from common.step_times import attended, due_at
from kvbaton.errors import OverloadedError, UnavailableError
from services.gateway.routing.assignment import Place
from services.gateway.routing.chooser import Chooser, owner_of
from services.gateway.routing.estimates import GUESSED_PROMPT_STEPS, resolved
from services.gateway.routing.line import Line
from services.gateway.routing.peers import Worker
from services.gateway.routing.stream import RequestStream

_RUN_UP_S = 0.5  # of prompts that a worker has from us, beyond which others wait in our own line
_RUN_UP_REQUESTS = 2  # that it has at any rate: one is computed, the next is there


class Placer:
    """The line of requests before the workers of one gateway's fleet, and who is let in."""

    def __init__(self, chooser: Chooser, clock: Clock) -> None:
        self.line: Line[asyncio.Future[None]] = Line()
        self._chooser = chooser
        self._routing = chooser.routing
        self._clock = clock
        self._unready_since: float | None = -math.inf
        self._news = asyncio.Event()  # set when who can take work changes, and replaced

    @property
    def is_ready(self) -> bool:
        return self._chooser.has_place

    @property
    def unready_s(self) -> float:
        """For how long nothing could have been served; 0 if it could be now."""
        return 0.0 if self._unready_since is None else self._clock.now() - self._unready_since

    def on_news(self) -> None:
        """Who can take work has changed."""
        if self.is_ready:
            self._unready_since = None
        elif self._unready_since is None:
            self._unready_since = self._clock.now()
        self._news.set()
        self._news = asyncio.Event()
        self.let_in()

    # ---- the line -------------------------------------------------------------------------------

    async def wait(self, stream: RequestStream, tried: set[Worker], patience_s: float) -> Place:
        """Where to serve a request, once that is possible; workers in `tried` come last. Raises
        UnavailableError after `patience_s`. Who was placed before does not wait in line again."""
        if not stream.timeline.num_attempts:
            await self._turn(stream)
        until = self._clock.now() + patience_s
        while True:
            news = self._news
            try:
                place, stream.placement = self._chooser.choose(stream, tried)
            except UnavailableError:
                self.let_in()  # those behind shall hear of it as well
                left_s = until - self._clock.now()
                if left_s <= 0:
                    raise
            else:
                self._chooser.placed(stream.request, place)
                return place
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await news.wait()

    def let_in(self) -> None:
        """A worker may have room for another, or whoever was let in has taken its place: it is the
        next one's turn."""
        if self.line and self._has_opening():
            self.line.take(self._clock.now()).set_result(None)

    def ended(self, stream: RequestStream) -> None:
        """A request is over: its output counts among tenants, too."""
        self.line.charge(owner_of(stream.request), len(stream.tokens))

    async def _turn(self, stream: RequestStream) -> None:
        if not self.line and self._has_opening():
            return
        request = stream.request
        turn = asyncio.get_running_loop().create_future()
        takes_s = self._prompt_s(len(request.prompt))
        target_s = self._routing.targets_of(request).ttft_ms / 1000
        received_at = stream.timeline.received_at
        self.line.add(
            turn,
            priority=request.priority,
            tenant=owner_of(request),
            num_tokens=len(request.prompt),
            takes_s=takes_s,
            due_at=received_at + target_s if target_s else due_at(received_at, takes_s),
            has_target=target_s > 0,
        )
        try:
            await first_of(turn)  # awaiting it itself would cancel it while it is in the line
        except asyncio.CancelledError:
            self.line.remove(turn)
            if turn.done():
                self.let_in()  # it was our turn, and we do not take it
            raise

    def _has_opening(self) -> bool:
        """Whether a worker would begin soon with what it is given now, or there is none."""
        workers = self._chooser.prefillers()
        if not workers or any(
            len(worker.backlog) < _RUN_UP_REQUESTS or worker.backlog_s() < _RUN_UP_S
            for worker in workers
        ):
            return True
        # Each helper takes one prompt at a time. Where it is not sooner there, one more waits here.
        helpers = self._chooser.helpers()
        num_given = sum(len(worker.backlog) for worker in (*workers, *helpers))
        return num_given < _RUN_UP_REQUESTS * len(workers) + len(helpers)

    def _prompt_s(self, num_tokens: int) -> float:
        """How long a worker takes for a prompt of which nothing is cached."""
        known = [worker.load.prompt_steps for worker in self._chooser.prefillers()]
        times = resolved(None, known, GUESSED_PROMPT_STEPS)
        return times.prompt_s(num_tokens, attended(num_tokens, 0))

    # ---- the place ------------------------------------------------------------------------------

    def check_target(self, stream: RequestStream) -> None:
        """Raises OverloadedError if this gateway refuses what would come late, and this would."""
        target_ms = self._routing.targets_of(stream.request).ttft_ms
        if not self._routing.refuses_late or not target_ms:
            return
        try:
            _, decision = self._chooser.choose(stream, set())
        except UnavailableError:
            return  # that is for others to say
        line_s = 0.0
        if self.line:
            line_s = self.line.ahead_s(owner_of(stream.request)) / max(
                1, len(self._chooser.prefillers())
            )
        option = decision.chosen
        expected_ms = option.ttft_ms + line_s * 1000
        if expected_ms > target_ms:
            raise OverloadedError(
                f"the first token would take about {expected_ms:.0f} ms "
                f"({line_s * 1000 + option.queue_ms:.0f} ms behind other prompts, "
                f"{option.transfer_ms + option.compute_ms:.0f} ms for this one's, of which "
                f"{option.num_cached_tokens} tokens are cached), which is more than the "
                f"{target_ms:g} ms that it is meant to take at most",
                retry_after_s=math.ceil((expected_ms - target_ms) / 1000),
            )
