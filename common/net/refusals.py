"""What was refused for want of a right or a key: counted, and told in the log now and then."""

from __future__ import annotations

import asyncio

import structlog
from prometheus_client import Counter

from common.metrics import REGISTRY

log = structlog.get_logger()

LOG_INTERVAL_S = 10.0  # whoever is refused may try again and again

_REFUSED = Counter(
    "kvbaton_refused", "messages that their sender had no right to, and keys not known", ["what"],
    registry=REGISTRY,
)  # fmt: skip


class Refusals:
    """Of one kind, `what`: key or message."""

    def __init__(self, what: str) -> None:
        self.num = 0
        self._what = what
        self._num_logged = 0
        self._log_again_at = 0.0
        self._loop = asyncio.get_running_loop()

    def add(self, **details: str) -> None:
        """One more. `details` are for the log."""
        self.num += 1
        _REFUSED.labels(self._what).inc()
        now = self._loop.time()
        if now >= self._log_again_at:
            log.warning(f"{self._what}_refused", num=self.num - self._num_logged, **details)
            self._num_logged, self._log_again_at = self.num, now + LOG_INTERVAL_S
