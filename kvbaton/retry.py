"""What a client asks of gateways until one has answered. Pure: the time is passed in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    UnavailableError,
)
from kvbaton.session import Event


class Retried(ABC):
    """Something that gateways are asked, one after the other. Its `sink` hears the answer."""

    def __init__(self, request_id: int, sink: Callable[[Event], None]) -> None:
        self.id = request_id
        self.is_over = False
        self.lost_at: float | None = None  # first without a gateway since the last news
        self.num_failures = 0  # since the last news
        self._sink = sink
        self._deadline_at = math.inf
        self._is_cancelled = False
        self._last_error: KvbatonError | None = None

    @abstractmethod
    def encoded(self, now: float) -> bytes:
        """The message for a gateway. Raises TooLargeError if it has become too large."""

    @abstractmethod
    def _take(self, event: Event) -> None:
        """Take in what is no error that another gateway may help with."""

    def take(self, event: Event, now: float) -> bool:
        """Take in what a gateway said. False if it does not go on there, but may elsewhere."""
        if self.is_over:
            return True
        if not (isinstance(event, KvbatonError) and self._may_go_on_after(event)):
            self._take(event)
        elif self._is_cancelled:
            self.cancelled()
        else:
            self.num_failures += 1
            self._last_error = event
            self.lost(now)
            return False
        return True

    def cancel(self) -> None:
        """It goes on nowhere else."""
        self._is_cancelled = True

    def cancelled(self) -> None:
        """It ends because its caller asked for it."""
        self.end(CancelledRequestError("the request was cancelled"))

    def lost(self, now: float) -> None:
        """It is without a gateway."""
        if self.lost_at is None:
            self.lost_at = now

    def give_up_at(self, patience_s: float) -> float:
        """Until when another gateway is waited for."""
        assert self.lost_at is not None
        return min(self.lost_at + patience_s, self._deadline_at)

    def give_up(self, now: float, reason: str) -> None:
        """No gateway was found in time."""
        if now >= self._deadline_at:
            self.end(DeadlineError(f"the deadline passed without a gateway: {reason}"))
        else:
            self.end(self._last_error or ConnectionLostError(reason))

    def end(self, event: Event) -> None:
        """The last it hears."""
        self.is_over = True
        self._sink(event)

    def _may_go_on_after(self, error: KvbatonError) -> bool:
        """Asked again, it does no harm."""
        return isinstance(error, ConnectionLostError | UnavailableError)

    def _news(self) -> None:
        """A gateway got somewhere with it: patience begins anew."""
        self.lost_at, self.num_failures = None, 0

    def _begin_deadline(self, deadline_ms: int | None, now: float) -> None:
        if deadline_ms is not None:
            self._deadline_at = now + deadline_ms / 1000

    def _rest_of(self, deadline_ms: int | None, now: float) -> int | None:
        """What the next gateway is told of the deadline."""
        if deadline_ms is None:
            return None
        return max(1, math.ceil((self._deadline_at - now) * 1000))
