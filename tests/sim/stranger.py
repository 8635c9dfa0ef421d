"""A peer that speaks the internal protocol as a test wants it to."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from common.engine.mock import MOCK_LAYOUT
from common.messages import (
    INTERNAL_VERSION,
    Failed,
    FromStore,
    FromWorker,
    Hello,
    Member,
    Message,
    decoder,
)
from common.net.order import first_number
from kvbaton.codec import encode
from tests.sim.cluster import SimCluster
from tests.sim.network import SimTransport

STRANGER_ID = "e" * 32

_DECODER = decoder(FromStore | FromWorker)


class Stranger:
    """A peer with a socket, and something to say to everyone."""

    def __init__(self, cluster: SimCluster, endpoint: str) -> None:
        self.refusal = ""  # what the last refusal said
        self._answers: list[Message] = []
        self._num_calls = 0
        self._num_hellos = 0
        self._next_number = 1
        self._pid = cluster.world.seams("elsewhere").pid
        transport = SimTransport(cluster.world.network, self._pid)
        self._socket = transport.dealer(endpoint, self._on_frames)

    def _on_frames(self, frames: list[memoryview]) -> None:
        message = _DECODER.decode(frames[0])
        if message.call_id or isinstance(message, Failed):  # a refusal of what cannot be decoded
            self._answers.append(message)

    async def hello(self, role: str, **changes: Any) -> str:
        member = Member(
            member_id=STRANGER_ID,
            role=role,
            name="stranger",
            host_id="elsewhere",
            pid=self._pid,
            endpoint="sim://stranger",
            fingerprint="mock",
            max_num_seqs=1,
            mover="zmq",
            layout=MOCK_LAYOUT,
        )
        member = msgspec.structs.replace(member, **changes)
        return await self.ask(Hello(internal_version=INTERNAL_VERSION, member=member))

    async def ask(self, message: Message, *bulk: bytes) -> str:
        """What comes back: the code of a refusal, the name of an answer, or "" for nothing."""
        self._num_calls += 1
        message.call_id = self._num_calls
        if isinstance(message, Hello):
            self._next_number = first_number(self._num_hellos)
            self._num_hellos += 1
        message.number = self._next_number
        self._next_number += 1
        self._answers.clear()
        self._socket.send([encode(message), *bulk])
        await asyncio.sleep(0.01)
        assert len(self._answers) <= 1
        for answer in self._answers:
            if not isinstance(answer, Failed):
                return type(answer).__name__
            assert answer.message
            self.refusal = answer.message
            return answer.code
        return ""
