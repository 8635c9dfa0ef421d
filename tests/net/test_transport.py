"""ZmqTransport on real sockets: order, size, peers that come, go, restart or do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any

import pytest
import uvloop
import zmq

from common.net.transport import RouterHandler, TransportError
from common.net.zmq_transport import LOST_HOST_MS, ZmqDealer, ZmqRouter, ZmqTransport
from kvbaton.sockets import MAX_FRAME_BYTES, READ_BATCH, EventSocket
from tests.ports import free_port

FREE_PORT = "tcp://127.0.0.1:*"
PATIENCE_S = 10.0
_LIMITS = (zmq.SNDHWM, zmq.RCVHWM, zmq.MAXMSGSIZE, zmq.HANDSHAKE_IVL, zmq.TCP_MAXRT)


class Inbox:
    """Handlers that put what arrives into a queue."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[bytes, list[bytes]]] = asyncio.Queue()

    def on_router(self, peer: bytes, frames: list[memoryview], user: str = "") -> None:
        assert user == "", "nobody has a key here"
        self._queue.put_nowait((peer, [bytes(frame) for frame in frames]))

    def on_dealer(self, frames: list[memoryview]) -> None:
        self.on_router(b"", frames)

    async def get(self) -> tuple[bytes, list[bytes]]:
        async with asyncio.timeout(PATIENCE_S):
            return await self._queue.get()

    async def frames(self) -> list[bytes]:
        return (await self.get())[1]


class Ends:
    """Makes routers and dealers, and closes them all."""

    def __init__(self) -> None:
        self._transport = ZmqTransport()
        self._sockets: list[ZmqRouter | ZmqDealer] = []

    def router(self, handler: RouterHandler, endpoint: str = FREE_PORT) -> ZmqRouter:
        router = self._transport.router(endpoint, handler)
        self._sockets.append(router)
        return router

    def dealer(self, endpoint: str, handler: Callable[[list[memoryview]], None]) -> ZmqDealer:
        dealer = self._transport.dealer(endpoint, handler)
        self._sockets.append(dealer)
        return dealer

    def close(self) -> None:
        for end in self._sockets:
            end.close()
        self._transport.close()


def free_endpoint() -> str:
    """A loopback port where nobody listens."""
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    with closing(Ends()) as ends:
        yield ends


async def test_messages_go_both_ways_frame_by_frame(ends: Ends) -> None:
    server, client = Inbox(), Inbox()
    router = ends.router(server.on_router)
    dealer = ends.dealer(router.endpoint, client.on_dealer)
    assert dealer.send([b"one", b"", b"three"])
    peer, frames = await server.get()
    assert frames == [b"one", b"", b"three"]
    assert router.send(peer, [b"answer"])
    assert await client.frames() == [b"answer"]


async def test_a_free_port_is_named_as_clients_can_use_it(ends: Ends) -> None:
    endpoint = ends.router(Inbox().on_router).endpoint
    assert endpoint.startswith("tcp://127.0.0.1:")
    assert int(endpoint.rpartition(":")[2]) > 0


async def test_more_messages_than_a_batch_all_come_in_order(ends: Ends) -> None:
    inbox = Inbox()
    dealer = ends.dealer(ends.router(inbox.on_router).endpoint, Inbox().on_dealer)
    numbers = [str(number).encode() for number in range(10 * READ_BATCH)]
    for number in numbers:
        assert dealer.send([number])
    assert [(await inbox.frames())[0] for _ in numbers] == numbers


async def test_large_frames_travel_from_the_memory_of_the_sender(ends: Ends) -> None:
    inbox = Inbox()
    dealer = ends.dealer(ends.router(inbox.on_router).endpoint, Inbox().on_dealer)
    block = bytes(range(256)) * 16_384
    assert dealer.send([b"header", memoryview(block)])
    assert await inbox.frames() == [b"header", block]


async def test_peers_are_told_apart(ends: Ends) -> None:
    server, first, second = Inbox(), Inbox(), Inbox()
    router = ends.router(server.on_router)
    ends.dealer(router.endpoint, first.on_dealer).send([b"first"])
    ends.dealer(router.endpoint, second.on_dealer).send([b"second"])
    for peer, (name,) in [await server.get(), await server.get()]:
        assert router.send(peer, [b"hello " + name])
    assert await first.frames() == [b"hello first"]
    assert await second.frames() == [b"hello second"]


async def test_a_peer_that_never_was_cannot_be_sent_to(ends: Ends) -> None:
    assert not ends.router(Inbox().on_router).send(b"nobody", [b"x"])


async def test_a_peer_that_left_cannot_be_sent_to(ends: Ends) -> None:
    server = Inbox()
    router = ends.router(server.on_router)
    dealer = ends.dealer(router.endpoint, Inbox().on_dealer)
    witness = ends.dealer(router.endpoint, Inbox().on_dealer)
    dealer.send([b"x"])
    peer, _ = await server.get()
    dealer.close()
    while router.send(peer, [b"x"]):
        witness.send([b"time passes"])
        await server.get()


async def test_a_peer_that_does_not_read_fills_its_queue_and_no_other(ends: Ends) -> None:
    server, client = Inbox(), Inbox()
    router = ends.router(server.on_router)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stuck:
        stuck.setsockopt(zmq.LINGER, 0)
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.connect(router.endpoint)
        stuck.send(b"x")
        slow, _ = await server.get()
        frame = bytes(16 * 1024)
        num_sent = 0
        while router.send(slow, [frame]):
            num_sent += 1
            assert num_sent < 1_000_000
        ends.dealer(router.endpoint, client.on_dealer).send([b"y"])
        peer, _ = await server.get()
        assert router.send(peer, [b"still served"])
        assert await client.frames() == [b"still served"]


async def test_a_dealer_whose_peer_is_away_queues_only_so_much(ends: Ends) -> None:
    dealer = ends.dealer(free_endpoint(), Inbox().on_dealer)
    num_sent = 0
    while dealer.send([b"x"]):
        num_sent += 1
        assert num_sent < 1_000_000
    assert num_sent > 0


async def test_a_dealer_finds_its_peer_when_that_starts_later(ends: Ends) -> None:
    inbox, endpoint = Inbox(), free_endpoint()
    ends.dealer(endpoint, Inbox().on_dealer).send([b"early"])
    ends.router(inbox.on_router, endpoint)
    assert await inbox.frames() == [b"early"]


async def test_a_restarted_router_sees_its_dealers_as_new_peers(ends: Ends) -> None:
    old, new, endpoint = Inbox(), Inbox(), free_endpoint()
    with closing(Ends()) as earlier:
        earlier.router(old.on_router, endpoint)
        dealer = ends.dealer(endpoint, Inbox().on_dealer)
        dealer.send([b"x"])
        first, _ = await old.get()
    router = ends.router(new.on_router, endpoint)
    dealer.send([b"y"])
    second, frames = await new.get()
    assert frames == [b"y"]
    assert router.send(second, [b"z"])
    assert second != first


async def test_a_handler_that_fails_does_not_make_the_socket_deaf(ends: Ends) -> None:
    inbox = Inbox()
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def handler(peer: bytes, frames: list[memoryview], _user: str) -> None:
        if bytes(frames[0]) == b"bad":
            raise ValueError("bad")
        inbox.on_router(peer, frames)

    dealer = ends.dealer(ends.router(handler).endpoint, Inbox().on_dealer)
    for frame in (b"bad", b"bad", b"good"):
        dealer.send([frame])
    assert await inbox.frames() == [b"good"]
    assert [str(failure["exception"]) for failure in failures] == ["bad", "bad"]


async def test_a_socket_may_be_closed_by_its_own_handler(ends: Ends) -> None:
    closed = asyncio.Event()

    def handler(_peer: bytes, _frames: list[memoryview], _user: str) -> None:
        router.close()
        closed.set()

    router = ends.router(handler)
    dealer = ends.dealer(router.endpoint, Inbox().on_dealer)
    for _ in range(3):
        dealer.send([b"x"])
    await asyncio.wait_for(closed.wait(), PATIENCE_S)
    assert not router.send(b"anyone", [b"x"])
    router.close()


async def test_a_closed_dealer_sends_nothing(ends: Ends) -> None:
    dealer = ends.dealer(ends.router(Inbox().on_router).endpoint, Inbox().on_dealer)
    dealer.close()
    assert not dealer.send([b"x"])


async def test_last_words_arrive_although_the_socket_closes_at_once(ends: Ends) -> None:
    inbox = Inbox()
    dealer = ends.dealer(ends.router(inbox.on_router).endpoint, Inbox().on_dealer)
    dealer.send([b"goodbye"])
    dealer.close()
    assert await inbox.frames() == [b"goodbye"]


async def test_what_cannot_be_bound_or_connected_is_named(ends: Ends) -> None:
    endpoint = ends.router(Inbox().on_router).endpoint
    with pytest.raises(TransportError, match=f"cannot bind {endpoint}: Address already in use"):
        ends.router(Inbox().on_router, endpoint)
    with pytest.raises(TransportError, match="cannot bind nonsense: Invalid argument"):
        ends.router(Inbox().on_router, "nonsense")
    with pytest.raises(TransportError, match="cannot connect to nonsense: Invalid argument"):
        ends.dealer("nonsense", Inbox().on_dealer)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_answer_that_comes_while_sending_is_read_at_once(run: Callable[[Any], Any]) -> None:
    """A send may eat the edge that tells of an arrival: hundreds of ping-pongs would hang."""

    async def main() -> None:
        with closing(Ends()) as ends:
            done = asyncio.Event()

            def on_request(peer: bytes, frames: list[memoryview], _user: str) -> None:
                router.send(peer, frames)

            def on_answer(frames: list[memoryview]) -> None:
                number = int(bytes(frames[0]))
                if number == 0:
                    done.set()
                else:
                    dealer.send([str(number - 1).encode()])

            router = ends.router(on_request)
            dealer = ends.dealer(router.endpoint, on_answer)
            dealer.send([b"300"])
            await asyncio.wait_for(done.wait(), PATIENCE_S)

    run(main())


async def test_every_socket_has_limits(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> None:
    made: list[EventSocket] = []
    usual = EventSocket.start

    def start(socket: EventSocket) -> None:
        made.append(socket)
        usual(socket)

    monkeypatch.setattr(EventSocket, "start", start)
    router = ends.router(Inbox().on_router)
    ends.dealer(router.endpoint, Inbox().on_dealer)
    small = closing(ZmqTransport())
    with small as transport, closing(transport.router(FREE_PORT, Inbox().on_router, 1000)):
        limits = [
            [int(str(socket.raw.getsockopt(option))) for option in _LIMITS] for socket in made
        ]
    usual_limits = [10_000, 10_000, MAX_FRAME_BYTES, 10_000, LOST_HOST_MS]
    assert limits == [usual_limits, usual_limits, [10_000, 10_000, 1000, 10_000, LOST_HOST_MS]]


async def test_who_sends_a_frame_that_is_too_long_is_hung_up_on(ends: Ends) -> None:
    inbox, lost = Inbox(), asyncio.Event()
    transport = ZmqTransport()
    with closing(transport), closing(transport.router(FREE_PORT, inbox.on_router, 1000)) as router:
        dealer = transport.dealer(router.endpoint, Inbox().on_dealer, lost.set)
        with closing(dealer):
            dealer.send([bytes(1000)])
            assert await inbox.frames() == [bytes(1000)]
            dealer.send([bytes(1001)])
            await asyncio.wait_for(lost.wait(), PATIENCE_S)
            dealer.send([b"short"])
            assert await inbox.frames() == [b"short"]


async def test_a_dealer_is_told_when_the_other_end_has_gone(ends: Ends) -> None:
    lost = asyncio.Event()
    inbox = Inbox()
    router = ends.router(inbox.on_router)
    transport = ZmqTransport()
    dealer = transport.dealer(router.endpoint, Inbox().on_dealer, lost.set)
    with closing(transport), closing(dealer):
        dealer.send([b"hello"])
        await inbox.get()
        assert not lost.is_set()
        router.close()
        await asyncio.wait_for(lost.wait(), 5)
