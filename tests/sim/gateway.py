"""A gateway without faces, for the simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.service import Seams, Tasks
from kvbaton.errors import ConnectionLostError
from services.gateway.admission import Admission
from services.gateway.dispatcher import Dispatcher
from services.gateway.stream import RequestStream

STORES = ("sim://store-0", "sim://store-1")


@dataclass
class Shape:
    """How many of each, and their settings."""

    num_prefill: int = 1
    num_decode: int = 1
    num_stores: int = 1
    num_gateways: int = 1
    num_blocks: int = 512
    mover: str = "auto"
    movers: tuple[str, ...] = ()  # of the workers, in turn, where they differ
    hosts: tuple[str, ...] = ("host",)  # where the workers are, in turn
    lost_after_s: float = 8.0
    disk_bytes: int = 0  # 0: no disk tier
    mode: str = "disaggregated"
    worker: dict[str, Any] = field(default_factory=dict)


class SimGateway:
    """Whoever asks it reads the stream itself."""

    def __init__(self, name: str, seams: Seams, shape: Shape) -> None:
        self.name = name
        self.seams = seams
        self.failures: list[BaseException] = []
        self.streams: list[RequestStream] = []
        self._tasks = Tasks(self.failures.append)
        self.dispatcher = Dispatcher(
            seams,
            self._tasks,
            name=name,
            stores=list(STORES[: shape.num_stores]),
            mode=shape.mode,
            admission=Admission(max_requests=1000, max_tokens=10**9, max_wait_s=1000),
            max_outage_s=60,
        )

    async def drain(self) -> None:
        """Take nothing new, and finish what is in flight."""
        await self.dispatcher.drain()

    async def close(self) -> None:
        """Whoever reads a stream sees its connection end."""
        await self._tasks.close()
        self.dispatcher.close()
        for stream in self.streams:
            stream.fail(ConnectionLostError("the gateway is gone"))
