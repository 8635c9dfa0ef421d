"""Sees each request of a gateway begin and end: keeps the last of them, and makes spans."""

from __future__ import annotations

import time
from typing import Protocol

from common.seams import Clock
from kvbaton.explanation import Explanation
from services.gateway.observe.explain import explain
from services.gateway.observe.recent import Ended, Recent
from services.gateway.routing.stream import RequestStream


class Spans(Protocol):
    """Where traces go."""

    def begin(self, stream: RequestStream, unix_now: float) -> None:
        """A request has come: it gets the `traceparent` of a span of its own."""

    def end(self, stream: RequestStream, explanation: Explanation) -> None:
        """It has ended."""


class Watch:
    """`spans` None: there are none."""

    def __init__(self, clock: Clock, spans: Spans | None = None) -> None:
        self.recent = Recent()
        self._clock = clock
        self._spans = spans

    def begun(self, stream: RequestStream) -> None:
        """A request has been taken."""
        if self._spans is not None:
            waited_s = self._clock.now() - stream.timeline.received_at
            self._spans.begin(stream, time.time() - waited_s)

    def ended(self, stream: RequestStream) -> None:
        """It is over."""
        now, unix_now = self._clock.now(), time.time()
        self.recent.add(
            Ended(
                stream.request.owner,
                stream.request_id,
                stream.num_cached_tokens,
                stream.timeline,
                now,
                unix_now,
            )
        )
        if self._spans is not None:
            self._spans.end(stream, explain(stream, now, unix_now))
