"""How the blocks of one worker move: what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import WorkerCounts
from common.transfer_rate import TransferRate


@dataclass(slots=True)
class Moving:
    """Shared by the movers of a worker, one for each store."""

    counts: WorkerCounts
    pulls: TransferRate = field(default_factory=TransferRate)
    pushes: TransferRate = field(default_factory=TransferRate)
