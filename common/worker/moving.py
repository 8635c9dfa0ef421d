"""How the blocks of one worker move: what is set, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.kv.encodings import INT8, PLANES
from common.messages import WorkerCounts
from common.net.nixl import Pieces
from common.transfer_rate import GUESSED_BYTES_PER_S, TransferRate

_GAIN = 1.05  # that compression has to bring


@dataclass(slots=True)
class Way:
    """One direction: the rate of blocks in bytes of their own, that of messages which bring them as
    they are, and that of those which bring them encoded, arithmetic and all."""

    blocks: TransferRate = field(default_factory=TransferRate)
    plain: TransferRate = field(default_factory=TransferRate)
    coded: TransferRate = field(default_factory=TransferRate)

    def is_slow(self, now: float) -> bool:
        """Whether blocks come sooner compressed: the link takes longer for what that saves than
        both ends for the arithmetic. Each is tried, and again after a time in which the other was
        better: both links and processors have other work at other times."""
        plain, coded = self.plain.bytes_per_s(now), self.coded.bytes_per_s(now)
        if not plain or plain >= GUESSED_BYTES_PER_S:
            return False
        return not coded or coded > _GAIN * plain


@dataclass(slots=True)
class Moving:
    """Shared by the movers of a worker, one for each store."""

    counts: WorkerCounts
    num_connections: int = 1  # to each store, for block bytes
    compression: str = "off"  # or lossless, or auto: that where the link is slow, or int8
    pulls: Way = field(default_factory=Way)
    pushes: Way = field(default_factory=Way)
    memory: Pieces | None = None  # to move by NIXL

    def encoding(self, way: Way, now: float) -> str:
        """Of the next message, if the store can read it; "" for blocks as they are."""
        if self.compression == "int8":
            return INT8
        is_auto = self.compression == "auto" and way.is_slow(now)
        return PLANES if is_auto or self.compression == "lossless" else ""
