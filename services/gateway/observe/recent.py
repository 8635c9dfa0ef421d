"""The last requests of a gateway, as /debug/requests shows them: each to its own tenant. Pure.

An explanation takes longer to make than most of what a gateway does for a request: it is made when
somebody wants to see it. Nothing of a prompt or an output is kept for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

import msgspec

from services.gateway.backend import Timeline
from services.gateway.observe.explain import explain

# About what there is to keep, once it is shown.
_REQUEST_BYTES = 4096
_PART_BYTES = 512


@dataclass(slots=True)
class Ended:
    """A request that is over, since `at` on the gateway's clock and `unix_at` on all others'."""

    tenant: str
    request_id: str
    num_cached_tokens: int
    timeline: Timeline
    at: float
    unix_at: float
    _shown: bytes = b""

    @property
    def num_bytes(self) -> int:
        """The room that it takes, about."""
        num_parts = sum(each.num_parts for each in self.timeline.attempts)
        return _REQUEST_BYTES + _PART_BYTES * num_parts

    def shown(self) -> bytes:
        """Its explanation as JSON."""
        if not self._shown:
            self._shown = msgspec.json.encode(explain(self, self.at, self.unix_at))
        return self._shown


class Recent:
    """Bounded in number and in bytes; the oldest go first."""

    def __init__(self, *, most: int = 256, most_bytes: int = 8 << 20) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._kept: deque[Ended] = deque()

    def add(self, ended: Ended) -> None:
        """One more."""
        self._kept.append(ended)
        self._num_bytes += ended.num_bytes
        while len(self._kept) > self._most or self._num_bytes > self._most_bytes:
            self._num_bytes -= self._kept.popleft().num_bytes

    def latest(self, limit: int, tenant: str | None) -> bytes:
        """Up to `limit` requests of a tenant, None for all, as JSON, the latest first."""
        found = (each.shown() for each in reversed(self._kept) if tenant in (None, each.tenant))
        return b'{"requests":[' + b",".join(islice(found, limit)) + b"]}"
