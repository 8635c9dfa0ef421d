"""Server and Link, the two ends of every internal connection, over real ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from common.messages import (
    INTERNAL_VERSION,
    FromStore,
    Heartbeat,
    Hello,
    Leave,
    Load,
    Member,
    Message,
    Ok,
    StaleError,
    Stopped,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.link import Link
from common.net.server import Server
from common.net.zmq_transport import ZmqTransport
from kvbaton.errors import ConnectionLostError, InvalidRequestError, KvbatonError, ProtocolError
from tests.net.test_transport import FREE_PORT, PATIENCE_S, Inbox, free_endpoint


class Store:
    """A server that answers heartbeats, keeps silent on `leave` and refuses `stopped`."""

    def __init__(self, endpoint: str, instance_id: str) -> None:
        self.transport = ZmqTransport()
        self.welcomes = True
        self.gone: list[bytes] = []
        self.bulk: list[bytes] = []
        self.refusal: KvbatonError = InvalidRequestError("no", field="member_id")
        self._instance_id = instance_id
        self.server = Server(
            self.transport,
            endpoint,
            decoder(ToStore),
            rights=RIGHTS["kvstore"],
            accept=self._accept,
            handle=self._handle,
            gone=lambda peer, _member: self.gone.append(peer),
        )

    def _accept(self, _peer: bytes, hello: Hello) -> Welcome:
        if not self.welcomes:
            raise InvalidRequestError(f"{hello.member.name} is not welcome")
        return Welcome(instance_id=self._instance_id)

    def _handle(self, _peer: bytes, message: Message, bulk: Sequence[memoryview]) -> Message | None:
        self.bulk = [bytes(frame) for frame in bulk]
        if isinstance(message, Stopped):
            raise self.refusal
        return Ok() if isinstance(message, Heartbeat) else None


@asynccontextmanager
async def running_store(
    endpoint: str = FREE_PORT, instance_id: str = "first"
) -> AsyncIterator[Store]:
    store = Store(endpoint, instance_id)
    try:
        yield store
    finally:
        store.server.close()
        store.transport.close()


class Worker:
    """A link and what it was told."""

    def __init__(self, endpoint: str, internal_version: int = INTERNAL_VERSION) -> None:
        self.transport = ZmqTransport()
        self.welcomes: asyncio.Queue[Welcome] = asyncio.Queue()
        self.pushed: asyncio.Queue[Message] = asyncio.Queue()
        self.refusals: asyncio.Queue[KvbatonError] = asyncio.Queue()
        member = Member(member_id="0" * 32, role="decode", name="decode.1", host_id="h", pid=1)
        self.link = Link(
            self.transport,
            endpoint,
            decoder(FromStore),
            hello=lambda: Hello(internal_version=internal_version, member=member),
            welcomed=self.welcomes.put_nowait,
            handle=self.pushed.put_nowait,
            refused=self.refusals.put_nowait,
        )

    async def welcome(self) -> Welcome:
        return await asyncio.wait_for(self.welcomes.get(), PATIENCE_S)


@asynccontextmanager
async def running_worker(endpoint: str) -> AsyncIterator[Worker]:
    worker = Worker(endpoint)
    try:
        yield worker
    finally:
        worker.link.close()
        worker.transport.close()


async def test_hello_comes_first_and_calls_are_answered() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        assert (await worker.welcome()).instance_id == "first"
        answers = await asyncio.gather(*(worker.link.call(Heartbeat()) for _ in range(20)))
        assert all(isinstance(answer, Ok) for answer in answers)
        assert [member.name for member in store.server.peers.values()] == ["decode.1"]


async def test_bulk_frames_travel_beside_the_message() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        await worker.link.call(Heartbeat(load=Load(num_running=1)), [b"one", memoryview(b"two")])
        assert store.bulk == [b"one", b"two"]


async def test_a_refusal_is_raised_as_the_error_it_was() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        with pytest.raises(InvalidRequestError, match="no") as caught:
            await worker.link.call(Stopped(member_id="0" * 32))
        assert caught.value.field == "member_id"
        store.refusal = StaleError("the handoff is over")
        with pytest.raises(StaleError, match="the handoff is over"):
            await worker.link.call(Stopped(member_id="0" * 32))


async def test_a_call_without_an_answer_ends_in_time() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        with pytest.raises(ConnectionLostError, match="no answer in time"):
            await worker.link.call(Leave(), timeout_s=0.01)
        assert isinstance(await worker.link.call(Heartbeat()), Ok)


async def test_a_server_pushes_to_those_it_knows() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        (peer,) = store.server.peers
        assert store.server.send(peer, Ok())
        assert isinstance(await asyncio.wait_for(worker.pushed.get(), PATIENCE_S), Ok)
        assert not store.server.send(b"stranger", Ok())


async def test_a_refused_hello_is_told_to_its_sender() -> None:
    async with running_store() as store:
        store.welcomes = False
        async with running_worker(store.server.endpoint) as worker:
            error = await asyncio.wait_for(worker.refusals.get(), PATIENCE_S)
            assert isinstance(error, InvalidRequestError)
            assert error.message == "decode.1 is not welcome"
            assert store.server.peers == {}


async def test_another_internal_version_is_refused_in_words() -> None:
    async with running_store() as store:
        worker = Worker(store.server.endpoint, INTERNAL_VERSION + 1)
        error = await asyncio.wait_for(worker.refusals.get(), PATIENCE_S)
        worker.link.close()
        worker.transport.close()
    assert isinstance(error, ProtocolError)
    assert f"this process speaks {INTERNAL_VERSION}" in error.message


async def test_a_link_made_before_its_server_finds_it() -> None:
    endpoint = free_endpoint()
    async with running_worker(endpoint) as worker, running_store(endpoint):
        await worker.welcome()
        assert isinstance(await worker.link.call(Heartbeat()), Ok)


async def test_a_restarted_server_fails_calls_in_flight_and_gets_a_hello() -> None:
    endpoint = free_endpoint()
    async with running_worker(endpoint) as worker:
        async with running_store(endpoint, "first"):
            assert (await worker.welcome()).instance_id == "first"
            lost = asyncio.ensure_future(worker.link.call(Leave()))
            await worker.link.call(Heartbeat())  # answered after the leave was taken
        async with running_store(endpoint, "second"):
            with pytest.raises(ConnectionLostError, match="had forgotten this connection"):
                await worker.link.call(Heartbeat())
            assert (await worker.welcome()).instance_id == "second"
            with pytest.raises(ConnectionLostError):
                await lost
            assert isinstance(await worker.link.call(Heartbeat()), Ok)


async def test_a_server_that_forgot_a_peer_asks_it_for_a_hello() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        (peer,) = store.server.peers
        assert store.server.forget(peer) is not None
        assert store.server.forget(peer) is None
        with pytest.raises(ConnectionLostError, match="had forgotten this connection"):
            await worker.link.call(Heartbeat())
        await worker.welcome()
        assert list(store.server.peers) == [peer]


async def test_a_reset_fails_calls_in_flight_and_says_hello_again() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        lost = asyncio.ensure_future(worker.link.call(Leave()))
        await worker.link.call(Heartbeat())
        worker.link.reset()
        with pytest.raises(ConnectionLostError, match="the connection was reset"):
            await lost
        await worker.welcome()


async def test_closing_a_link_fails_its_calls() -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        lost = asyncio.ensure_future(worker.link.call(Leave()))
        await worker.link.call(Heartbeat())
        worker.link.close()
        with pytest.raises(ConnectionLostError, match="this end closed the connection"):
            await lost
        with pytest.raises(ConnectionLostError, match="takes no more messages"):
            await worker.link.call(Heartbeat())


async def test_a_peer_that_left_is_gone_at_the_next_push() -> None:
    async with (
        running_store() as store,
        running_worker(store.server.endpoint) as witness,
    ):
        async with running_worker(store.server.endpoint) as worker:
            await worker.welcome()
            await witness.welcome()
        while not store.gone:
            for peer in list(store.server.peers):
                store.server.send(peer, Ok())
            await witness.link.call(Heartbeat())
        assert len(store.server.peers) == 1
        assert store.gone[0] not in store.server.peers


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x81\xa4type\xa4nope"], [b"", b"x"]])
async def test_bytes_that_are_no_message_are_refused_and_the_server_goes_on(
    frames: list[bytes],
) -> None:
    async with running_store() as store, running_worker(store.server.endpoint) as worker:
        await worker.welcome()
        inbox, transport = Inbox(), ZmqTransport()
        stranger = transport.dealer(store.server.endpoint, inbox.on_dealer)
        stranger.send(frames)
        (answer,) = await inbox.frames()
        assert b"protocol_error" in answer
        stranger.close()
        transport.close()
        assert isinstance(await worker.link.call(Heartbeat()), Ok)


async def test_whoever_has_not_said_hello_is_asked_to() -> None:
    async with running_store() as store:
        inbox, transport = Inbox(), ZmqTransport()
        stranger = transport.dealer(store.server.endpoint, inbox.on_dealer)
        stranger.send([b"\x81\xa4type\xa5leave"])
        (answer,) = await inbox.frames()
        assert b"hello_required" in answer
        stranger.close()
        transport.close()
        assert store.server.peers == {}
