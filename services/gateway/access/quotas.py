"""How much an API key may ask for: token buckets, with the time passed in.

A gateway counts what it serves itself: behind K gateways a key gets up to K times its limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbaton.errors import OverloadedError

_MINUTE_S = 60.0
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one key may use; None: without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit is reached, and after how long the same request is let through."""

    limit: str
    wait_s: float


class Bucket:
    """Fills up evenly, `size` in `period_s`, and is full at first.

    What is larger than the whole bucket is let through when it is full, and leaves a debt: it would
    never be otherwise.
    """

    def __init__(self, limit: str, size: int, period_s: float, now: float) -> None:
        self.limit = limit
        self._size = size
        self._per_s = size / period_s
        self._level = float(size)
        self._level_at = now

    def wait_s(self, wanted: float, now: float) -> float:
        """How long until so much can be taken; 0 if it can."""
        self._fill(now)
        return max(0.0, min(wanted, self._size) - self._level) / self._per_s

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def give_back(self, amount: float) -> None:
        """Undo a part of a `take`."""
        self._level = min(self._size, self._level + amount)

    def _fill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._level_at) * self._per_s)
        self._level_at = now


class Quota:
    """What one key has used of its limits."""

    def __init__(self, limits: Limits, now: float) -> None:
        def bucket(name: str, period_s: float) -> list[Bucket]:
            size = getattr(limits, name)
            return [] if size is None else [Bucket(f"{name} = {size}", size, period_s, now)]

        self._requests = bucket("requests_per_minute", _MINUTE_S)
        self._tokens = [
            *bucket("tokens_per_minute", _MINUTE_S),
            *bucket("tokens_per_day", _DAY_S),
        ]

    def take_request(self, now: float) -> Refusal | None:
        """Count a request, or say why it must wait."""
        return _take(self._requests, 1, now)

    def take_tokens(self, num_tokens: int, now: float) -> Refusal | None:
        """Set aside the most that a request can use, or say why it must wait."""
        return _take(self._tokens, num_tokens, now)

    def give_back(self, num_tokens: int) -> None:
        """A request has ended, and did not use so many of its tokens."""
        for bucket in self._tokens:
            bucket.give_back(num_tokens)


class Charge:
    """Tokens that are set aside for a request until it has ended."""

    def __init__(self, quota: Quota, num_tokens: int) -> None:
        self._quota = quota
        self._num_tokens = num_tokens

    def settle(self, num_used: int) -> None:
        """It has used so many: give the others back. Idempotent."""
        self._quota.give_back(self._num_tokens - num_used)
        self._num_tokens = num_used


def over_quota(refusal: Refusal) -> OverloadedError:
    """The error for a key that has reached a limit."""
    wait_s = math.ceil(refusal.wait_s)
    return OverloadedError(
        f"this API key has reached its limit of {refusal.limit}: try again in {wait_s} s",
        retry_after_s=refusal.wait_s,
    )


def _take(buckets: list[Bucket], amount: float, now: float) -> Refusal | None:
    """From all of them or from none."""
    waits = [(bucket.wait_s(amount, now), bucket.limit) for bucket in buckets]
    wait_s, limit = max(waits, default=(0.0, ""))
    if wait_s > 0:
        return Refusal(limit, wait_s)
    for bucket in buckets:
        bucket.take(amount, now)
    return None
