"""How the blocks of one worker move: what is set, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import WorkerCounts
from common.transfer_rate import TransferRate


@dataclass(slots=True)
class Moving:
    """Shared by the movers of a worker, one for each store."""

    counts: WorkerCounts
    num_connections: int = 1  # to each store, for block bytes
    pulls: TransferRate = field(default_factory=TransferRate)
    pushes: TransferRate = field(default_factory=TransferRate)
