"""What a worker has counted since it started: told with its heartbeats, shown at /metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

import msgspec

from common.metrics import STEP_TOKEN_BUCKETS, TRANSFER_BUCKETS_BYTES, TRANSFER_BUCKETS_S

Total = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
_MAX_BUCKETS = 32


class Distribution(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How many values fell into each bucket, the last being those above every bound. Which bounds
    is known where it is added to and shown."""

    counts: Annotated[list[Total], msgspec.Meta(max_length=_MAX_BUCKETS)] = []
    total: Amount = 0.0

    def add(self, value: float, bounds: Sequence[float]) -> None:
        """One more value."""
        self.counts = self.counts or [0] * (len(bounds) + 1)
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value


class WorkerCounts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Of one process. `step_s` is spent in the engine, `arithmetic_s` of it in the model (0
    where that is not known: work.Engine); `busy_s` from one step to the next, while there are any.

    A transfer is one message of blocks, there and back, between the worker and a store whose memory
    it does not share; `num_transfers_failed` are not among the others. `num_device_blocks` were
    copied into a device's memory when they were granted or handed over, `num_neighbour_blocks` of
    them from that of another worker there.
    """

    num_steps: Total = 0
    step_s: Amount = 0.0
    busy_s: Amount = 0.0
    arithmetic_s: Amount = 0.0
    step_tokens: Distribution = msgspec.field(default_factory=Distribution)
    num_preemptions: Total = 0
    num_messages_refused: Total = 0
    transfer_bytes: Distribution = msgspec.field(default_factory=Distribution)
    transfer_s: Distribution = msgspec.field(default_factory=Distribution)
    num_transfers_failed: Total = 0
    num_device_blocks: Total = 0
    num_neighbour_blocks: Total = 0

    def step(self, num_tokens: int, step_s: float) -> None:
        """The engine has computed a step."""
        self.num_steps += 1
        self.step_s += step_s
        self.step_tokens.add(num_tokens, STEP_TOKEN_BUCKETS)

    def transfer(self, num_bytes: int, transfer_s: float) -> None:
        """Blocks have been moved."""
        self.transfer_bytes.add(num_bytes, TRANSFER_BUCKETS_BYTES)
        self.transfer_s.add(transfer_s, TRANSFER_BUCKETS_S)
