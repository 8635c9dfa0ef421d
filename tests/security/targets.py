"""What hostile bytes are sent at within this process: decoders, and servers without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from common.messages import (
    INTERNAL_VERSION,
    FromStore,
    Heartbeat,
    Hello,
    Member,
    Message,
    Ok,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.order import first_number, read
from common.net.server import Server
from common.net.transport import DealerHandler, DealerSocket, Frames, RouterHandler
from common.service import Tasks, live_seams
from kvbaton.codec import Decoder, encode
from kvbaton.errors import KvbatonError, ProtocolError
from kvbaton.protocol import (
    ClientMessage,
    Done,
    Generate,
    Tokens,
    client_message_decoder,
    gateway_message_decoder,
)
from kvbaton.protocol import Hello as ClientHello
from services.gateway.access.admin import Admin
from services.gateway.clients.face import ClientFace
from tests.security.hostile import hostile, message, packed
from tests.security.samples import UNIONS
from tests.unit.gateway_fakes import FakeBackend, FakeRng, demo_model, says

DECODERS: dict[str, Decoder[Any]] = {
    "client": client_message_decoder(),
    "gateway": gateway_message_decoder(),
    **{name: decoder(union) for name, union in UNIONS.items() if "_" in name},
}
PROMPT, ANSWER = "x", "tweet"
_ATTACKERS = [b"attacker-1", b"attacker-2"]


def decode(union: str, raw: bytes) -> bool:
    """Whether it is a message; anything but that and a ProtocolError is raised. What was decoded
    must go over the wire again."""
    refusal: ProtocolError | None = None
    try:
        decoded = DECODERS[union].decode(raw)
    except ProtocolError as error:
        refusal = error
    if "_" in union:
        _, refused = read(DECODERS[union], [memoryview(raw)])
        assert (refused is None) == (refusal is None)
    if refusal is not None:
        assert refusal.message
        return False
    assert DECODERS[union].decode(encode(decoded)) is not None
    return True


def _no_defect(answer: Any) -> None:
    """A server that met an exception which it did not expect says so, and goes on."""
    assert getattr(answer, "code", "") != KvbatonError.code, answer


class Wire:
    """A transport with one ROUTER, whose peers are whoever the test says."""

    endpoint = "memory"

    def __init__(self) -> None:
        self.sent: dict[bytes, list[bytes]] = {}
        self._handler: RouterHandler

    def router(
        self,
        _endpoint: str,
        handler: RouterHandler,
        _max_frame_bytes: int = 0,
        _slow_reader_s: float | None = None,
    ) -> Wire:
        self._handler = handler
        return self

    def dealer(
        self,
        _endpoint: str,
        _handler: DealerHandler,
        _lost: Callable[[], None] | None = None,
        _role: str = "",
    ) -> DealerSocket:
        raise NotImplementedError("nobody connects from here")

    def send(self, peer: bytes, frames: Frames) -> bool:
        self.sent.setdefault(peer, []).append(bytes(frames[0]))
        return True

    def close(self) -> None:
        """Nothing to close."""

    def deliver(self, peer: bytes, frames: Frames, user: str = "") -> None:
        self._handler(peer, [memoryview(bytes(frame)) for frame in frames], user)

    def take(self, peer: bytes) -> list[bytes]:
        """What was sent to a peer."""
        return self.sent.pop(peer, [])


class ServerTarget:
    """A server of internal messages. Attackers know how to say hello and how to count."""

    def __init__(self) -> None:
        self._wire = Wire()
        self._numbers: dict[bytes, int] = {}
        self._num_hellos = 0
        self.num_handled = 0
        self._server = Server(
            self._wire,
            "memory",
            decoder(ToStore),
            rights=RIGHTS["kvstore"],
            accept=lambda _peer, _hello: Welcome(instance_id="0" * 32),
            handle=self._handle,
            gone=lambda _peer, _member: None,
        )
        self._decoder = decoder(FromStore)

    def _handle(self, _peer: bytes, _message: Message, _bulk: object) -> Message:
        self.num_handled += 1
        return Ok()

    def attack(self, rng: Random) -> None:
        """One message of an attacker, of one frame or several."""
        peer = rng.choice(_ATTACKERS)
        if rng.random() < 0.1 or peer not in self._numbers:
            self._hello(peer)
        frames = [hostile(rng, "to_store")]
        if rng.random() < 0.5:  # numbered well, so that it gets past the order of messages
            number = self._numbers[peer] = self._numbers[peer] + 1
            frames = [packed(message(rng, "to_store") | {"number": number})]
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            frames.append(rng.randbytes(rng.choice([0, 1, 64])))
        self._wire.deliver(peer, frames if rng.random() < 0.98 else [])
        for raw in self._wire.take(peer):
            _no_defect(self._decoder.decode(raw))

    def canary(self) -> None:
        """An honest peer is answered."""
        peer = b"honest"
        self._hello(peer)
        number = self._numbers[peer] + 1
        self._wire.deliver(peer, [encode(Heartbeat(call_id=7, number=number))])
        answers = [self._decoder.decode(raw) for raw in self._wire.take(peer)]
        assert [type(answer) for answer in answers] == [Welcome, Ok]
        assert answers[-1].call_id == 7

    def _hello(self, peer: bytes) -> None:
        self._num_hellos += 1
        number = self._numbers[peer] = first_number(self._num_hellos)
        member = Member(member_id="0" * 32, role="decode", name="d", host_id="h", pid=1)
        hello = Hello(internal_version=INTERNAL_VERSION, member=member, number=number)
        self._wire.deliver(peer, [encode(hello)])


class FaceTarget:
    """The gateway's face for clients, over a backend that answers at once."""

    def __init__(self) -> None:
        self._wire = Wire()
        self._failures: list[BaseException] = []
        self._tasks = Tasks(self._failures.append)
        self._seams = live_seams()
        seams = replace(self._seams, transport=self._wire, rng=FakeRng())
        self._backend = FakeBackend(lambda _request: says(ANSWER))
        self._face = ClientFace(
            seams,
            "memory",
            self._backend,
            demo_model(),
            Admin("a key of 16 chars", (), seams.clock),
            tasks=self._tasks,
            instance_id="0" * 32,
        )
        self._num_canaries = 0
        self.num_served = 0  # requests of attackers that were fit to be served

    async def attack(self, rng: Random) -> None:
        """One message of an attacker; most have said hello."""
        peer = rng.choice(_ATTACKERS)
        if rng.random() < 0.3:
            self._wire.deliver(peer, [encode(ClientHello(protocol_version=1))])
        frames = [hostile(rng, "client")] * rng.choice([0, 1, 1, 1, 1, 1, 1, 2])
        if rng.random() < 0.1:
            frames = [encode(Generate(id=rng.randrange(3), text=PROMPT))]
        num_requests = len(self._backend.requests)
        self._wire.deliver(peer, frames)
        await asyncio.sleep(0)
        self.num_served += len(self._backend.requests) - num_requests
        for raw in self._wire.take(peer):
            _no_defect(DECODERS["gateway"].decode(raw))

    async def canary(self) -> None:
        """An honest client's request is served, token by token."""
        peer = b"honest"
        self._num_canaries += 1
        self._backend.requests.clear()
        self._backend.streams.clear()
        hello: ClientMessage = ClientHello(protocol_version=1)
        self._wire.deliver(peer, [encode(hello)])
        self._wire.deliver(peer, [encode(Generate(id=self._num_canaries, text=PROMPT))])
        answers: list[Any] = []
        while not answers or not isinstance(answers[-1], Done):
            await asyncio.sleep(0)
            answers += [DECODERS["gateway"].decode(raw) for raw in self._wire.take(peer)]
        tokens = [token for each in answers if isinstance(each, Tokens) for token in each.tokens]
        assert "".join(token.text for token in tokens) == ANSWER
        assert [token.index for token in tokens] == list(range(len(tokens)))

    async def close(self) -> None:
        self._face.close()
        await self._tasks.close()
        self._seams.transport.close()
        assert self._failures == []
