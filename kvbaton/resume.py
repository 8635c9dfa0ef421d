"""One request across as many gateways as it takes. Pure: the time is passed in.

Sampling depends on the seed and the position alone: a gateway that is told the seed and the tokens
so far goes on as the one that was lost would have done. What that takes is kept here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from kvbaton.protocol import Accepted, Generate, Resume, Tokens
from kvbaton.request import encode_request
from kvbaton.session import Event

RESUME_S = 60.0


class ResumableRequest:
    """What a request's `sink` hears is one run: no token is missing or comes twice."""

    def __init__(self, message: Generate, sink: Callable[[Event], None]) -> None:
        """Raises UnprocessableError and TooLargeError for what cannot be sent."""
        self.is_over = False
        self.lost_at: float | None = None  # first without a gateway since its last token
        self.num_failures = 0  # since its last token
        self._message = msgspec.structs.replace(message, resumable=True)
        self._raw = encode_request(self._message)  # until it is sent
        self._sink = sink
        self._accepted: Accepted | None = None
        self._tokens: list[int] = []
        self._finish_reason: str | None = None
        self._deadline_at = math.inf
        self._is_cancelled = False
        self._last_error: KvbatonError | None = None

    @property
    def id(self) -> int:
        return self._message.id

    def encoded(self, now: float) -> bytes:
        """The `generate` for a gateway. Raises TooLargeError if it has become too large."""
        deadline_ms = self._message.deadline_ms
        if self._raw:
            raw, self._raw = self._raw, b""
            if deadline_ms is not None:
                self._deadline_at = now + deadline_ms / 1000
            return raw
        if deadline_ms is not None:
            deadline_ms = max(1, math.ceil((self._deadline_at - now) * 1000))
        message = msgspec.structs.replace(self._message, deadline_ms=deadline_ms)
        return encode_request(message if self._accepted is None else self._going_on(message))

    def take(self, event: Event, now: float) -> bool:
        """Take in what a gateway said. False if it does not go on there, but may elsewhere."""
        if self.is_over:
            return True
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, Tokens):
            self._take_tokens(event)
        elif not (isinstance(event, KvbatonError) and self._may_go_on_after(event)):
            self.end(event)
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

    def _going_on(self, message: Generate) -> Generate:
        """The seed stands in both places: a gateway that does not know `resume` begins again, and
        with this seed gives the same."""
        assert self._accepted is not None
        seed = self._accepted.seed
        return msgspec.structs.replace(
            message,
            sampling=msgspec.structs.replace(message.sampling, seed=seed),
            resume=Resume(
                request_id=self._accepted.request_id,
                seed=seed,
                tokens=self._tokens,
                finish_reason=self._finish_reason,
            ),
        )

    def _may_go_on_after(self, error: KvbatonError) -> bool:
        """What was accepted once is not given up because there is much to do elsewhere. What has
        tokens but was not, by a gateway that does not know how, cannot go on."""
        if self._accepted is None and (self._tokens or isinstance(error, OverloadedError)):
            return False
        return isinstance(error, ConnectionLostError | UnavailableError | OverloadedError)

    def _take_tokens(self, event: Tokens) -> None:
        num_known = len(self._tokens)
        new = [token for token in event.tokens if token.index >= num_known]
        if [token.index for token in new] != list(range(num_known, num_known + len(new))):
            self.end(ProtocolError(f"token {num_known} was due, the gateway sent others"))
        elif new:
            self._tokens += [token.token_id for token in new]
            self._finish_reason = event.finish_reason
            self.lost_at, self.num_failures = None, 0
            self._sink(msgspec.structs.replace(event, tokens=new))
