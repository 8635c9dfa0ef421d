"""Whether a new request is taken: bounds in number, tokens and predicted wait. Pure.

The wait for a first token is predicted by Little's law (Little, 1961): what waits now, in prompt
tokens, over the rate at which first tokens came while anything waited. The rate needs no model of
the cluster, and other gateways that use the same workers show in it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from prometheus_client import Counter, Gauge

from common.metrics import REGISTRY
from kvbaton.errors import OverloadedError

_HORIZON_S = 10.0  # of waiting; what was before counts little
_EVIDENCE_S = 2.0  # of waiting, before a rate says anything: the first of a burst begin one by one

_REFUSED = Counter(
    "kvbaton_requests_refused_total", "Requests not taken, by reason", ["reason"], registry=REGISTRY
)
_WAIT = Gauge(
    "kvbaton_predicted_wait_seconds",
    "Wait of the last request that came",
    registry=REGISTRY,
)


class Admission:
    """Counts the requests that one gateway has taken, and those that wait for their first token."""

    def __init__(self, *, max_requests: int, max_tokens: int, max_wait_s: float) -> None:
        """`max_tokens`: prompt tokens of all that wait; `max_wait_s`: the most predicted wait."""
        self.num_requests = 0
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._waiting: dict[Hashable, int] = {}  # prompt tokens
        self._num_waiting_tokens = 0
        self._num_begun_tokens = 0.0  # both of these fade
        self._busy_s = 0.0
        self._at = 0.0

    def predicted_wait_s(self, now: float) -> float:
        """How long a request that comes now waits before its own prompt's turn. 0 if unknown."""
        self._advance(now)
        if self._busy_s < _EVIDENCE_S or not self._num_begun_tokens:
            return 0.0
        return self._num_waiting_tokens * self._busy_s / self._num_begun_tokens

    def take(self, request: Hashable, num_tokens: int, now: float, *, is_new: bool = True) -> None:
        """A request has come. One that goes on from another gateway has waited already.

        Raises OverloadedError with the reason, and with when to try again.
        """
        if self.num_requests >= self._max_requests:
            self._refuse("requests", f"this gateway already serves {self._max_requests} requests")
        if self._waiting and self._num_waiting_tokens + num_tokens > self._max_tokens:
            self._refuse(
                "tokens",
                f"prompts of {self._num_waiting_tokens} tokens already wait, this one has "
                f"{num_tokens}, and this gateway lets {self._max_tokens} wait",
            )
        wait_s = self.predicted_wait_s(now)
        _WAIT.set(wait_s)
        if is_new and wait_s > self._max_wait_s:
            self._refuse(
                "wait",
                f"the first token would take about {wait_s:.1f} s to begin, and this gateway lets "
                f"requests wait {self._max_wait_s:g} s",
                retry_after_s=math.ceil(wait_s - self._max_wait_s),
            )
        self.num_requests += 1
        self._waiting[request] = num_tokens
        self._num_waiting_tokens += num_tokens

    def first_token(self, request: Hashable, now: float) -> None:
        """A token of this request has come; only the first counts."""
        num_tokens = self._waiting.get(request)
        if num_tokens is not None:
            self._advance(now)
            self._num_begun_tokens += num_tokens
            self._leave(request)

    def end(self, request: Hashable, now: float) -> None:
        """A request that was taken is over."""
        self.num_requests -= 1
        if request in self._waiting:
            self._advance(now)
            self._leave(request)

    def _leave(self, request: Hashable) -> None:
        self._num_waiting_tokens -= self._waiting.pop(request)

    def _advance(self, now: float) -> None:
        """Time in which nothing waited tells nothing of the rate."""
        passed_s = now - self._at
        self._at = now
        if self._waiting and passed_s > 0:
            kept = math.exp(-passed_s / _HORIZON_S)
            self._num_begun_tokens *= kept
            self._busy_s = self._busy_s * kept + _HORIZON_S * (1 - kept)

    @staticmethod
    def _refuse(reason: str, message: str, retry_after_s: int = 1) -> None:
        _REFUSED.labels(reason).inc()
        raise OverloadedError(message, retry_after_s=retry_after_s)
