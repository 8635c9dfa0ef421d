"""The client protocol on real ZeroMQ: a running face, a scripted gateway, a raw client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from common.net.access import Keys
from common.net.zmq_transport import ZmqTransport
from common.service import Tasks, live_seams
from kvbaton.codec import encode
from kvbaton.protocol import (
    ClientMessage,
    Done,
    Error,
    GatewayMessage,
    Hello,
    Token,
    Tokens,
    Welcome,
    client_message_decoder,
    gateway_message_decoder,
)
from services.gateway.access.admin import Admin
from services.gateway.clients.face import ClientFace
from services.gateway.routing.peers import Store
from tests.unit.gateway_fakes import FakeBackend, FakeRng, demo_model

FREE_PORT = "tcp://127.0.0.1:*"
PATIENCE_S = 10.0


class FakeClock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


@asynccontextmanager
async def running_face(
    backend: FakeBackend,
    *,
    endpoint: str = FREE_PORT,
    instance_id: str = "instance-1",
    clock: FakeClock | None = None,
    admin_key: str = "",
    keys: Keys | None = None,
    stores: Sequence[Store] = (),
    slow_reader_s: float = 30.0,
) -> AsyncIterator[ClientFace]:
    """A msgpack face; a task of it that fails, fails the test."""
    failures: list[BaseException] = []
    tasks = Tasks(failures.append)
    seams = replace(live_seams(ZmqTransport(keys)), clock=clock or FakeClock(), rng=FakeRng())
    try:
        face = ClientFace(
            seams,
            endpoint,
            backend,
            demo_model(),
            Admin(admin_key, stores, seams.clock),
            tasks=tasks,
            instance_id=instance_id,
            slow_reader_s=slow_reader_s,
        )
        try:
            yield face
        finally:
            face.close()
    finally:
        await tasks.close()
        seams.transport.close()
    assert failures == []


class ScriptedGateway:
    """A ROUTER that says what a test tells it to."""

    def __init__(self, transport: ZmqTransport, endpoint: str) -> None:
        self._decoder = client_message_decoder()
        self._received: asyncio.Queue[tuple[bytes, ClientMessage]] = asyncio.Queue()
        self._socket = transport.router(endpoint, self._on_frames)
        self.endpoint = self._socket.endpoint
        self.peer = b""

    def _on_frames(self, peer: bytes, frames: list[memoryview], _user: str) -> None:
        self._received.put_nowait((peer, self._decoder.decode(frames[0])))

    async def receive(self) -> ClientMessage:
        """The next message; its sender becomes `peer`."""
        async with asyncio.timeout(PATIENCE_S):
            self.peer, message = await self._received.get()
        return message

    def send(self, message: GatewayMessage) -> None:
        self.send_frames([encode(message)])

    def send_frames(self, frames: list[bytes]) -> None:
        assert self._socket.send(self.peer, frames)

    async def welcome(self, instance_id: str = "instance-1") -> None:
        """Take a hello and answer it."""
        assert isinstance(await self.receive(), Hello)
        self.send(Welcome(protocol_version=1, instance_id=instance_id, model="demo"))

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def scripted_gateway(endpoint: str = FREE_PORT) -> AsyncIterator[ScriptedGateway]:
    transport = ZmqTransport()
    gateway = ScriptedGateway(transport, endpoint)
    try:
        yield gateway
    finally:
        gateway.close()
        transport.close()


class RawClient:
    """A DEALER that sends whatever a test gives it."""

    def __init__(self, transport: ZmqTransport, endpoint: str) -> None:
        self._decoder = gateway_message_decoder()
        self._received: asyncio.Queue[GatewayMessage] = asyncio.Queue()
        self._socket = transport.dealer(endpoint, self._on_frames)

    def _on_frames(self, frames: list[memoryview]) -> None:
        (frame,) = frames
        self._received.put_nowait(self._decoder.decode(frame))

    def send(self, *messages: ClientMessage) -> None:
        for message in messages:
            self.send_frames([encode(message)])

    def send_frames(self, frames: list[bytes]) -> None:
        assert self._socket.send(frames)

    async def receive(self) -> GatewayMessage:
        async with asyncio.timeout(PATIENCE_S):
            return await self._received.get()

    async def ask(self, message: ClientMessage) -> GatewayMessage:
        self.send(message)
        return await self.receive()

    async def answers(self) -> tuple[list[Token], Done | Error]:
        """All of one request's tokens and its end."""
        tokens: list[Token] = []
        while isinstance(message := await self.receive(), Tokens):
            tokens += message.tokens
        assert isinstance(message, Done | Error)
        return tokens, message

    async def hello(self) -> Welcome:
        welcome = await self.ask(Hello(protocol_version=1))
        assert isinstance(welcome, Welcome)
        return welcome

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def raw_client(endpoint: str) -> AsyncIterator[RawClient]:
    transport = ZmqTransport()
    client = RawClient(transport, endpoint)
    try:
        yield client
    finally:
        client.close()
        transport.close()
