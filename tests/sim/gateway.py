"""A gateway without faces, for the simulated cluster."""

from __future__ import annotations

from common.service import Seams, Tasks
from kvbaton.errors import ConnectionLostError
from services.gateway.routing.admission import Admission
from services.gateway.routing.chooser import Routing
from services.gateway.routing.dispatcher import Dispatcher
from services.gateway.routing.stream import RequestStream


class SimGateway:
    """Whoever asks it reads the stream itself."""

    def __init__(self, name: str, seams: Seams, stores: list[str], routing: Routing) -> None:
        self.name = name
        self.seams = seams
        self.failures: list[BaseException] = []
        self.streams: list[RequestStream] = []
        self._tasks = Tasks(self.failures.append)
        self.dispatcher = Dispatcher(
            seams,
            self._tasks,
            name=name,
            stores=stores,
            routing=routing,
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
