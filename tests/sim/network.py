"""A network in memory, after ZeroMQ's ROUTER and DEALER; tests/net compares it with the real one.

- A pipe delivers in order, or not at all. It takes `high_water_mark` messages, then refuses more;
  room comes back in halves, as ZeroMQ gives it.
- A dealer keeps what it sends while nobody is bound, and connects again by itself. Each connection
  has a routing id of its own; what was on its way when one broke is lost.
- A router refuses what is for an unknown id. What is for a peer that has just gone is lost silently
  until the router notices.

Tests make pipes slow (`delay`), full (`Pipe.is_full`) or broken (`break_link`), end processes
(`kill`), or disturb many pipes at once (tests/sim/disturbances.py). `listeners` are called with all
that is delivered.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import TypeVar

import msgpack
import msgspec

from common.messages import Message
from common.net.transport import DealerHandler, Frames, RouterHandler, TransportError
from kvbaton.sockets import HIGH_WATER_MARK
from tests.sim.disturbances import Disturbance
from tests.sim.loop import virtual_loop

USUAL_DELAY_S = (50e-6, 2e-3)
NOTICE_S = 1e-3  # after which the other end knows that a connection is gone

M = TypeVar("M", bound=Message)

PipeTest = Callable[["Pipe"], bool]
Listener = Callable[["Pipe", list[memoryview]], None]


def type_of(frames: list[memoryview]) -> str:
    """The tag of an encoded message, without decoding the rest."""
    head = bytes(frames[0][:48])
    start = head.find(b"\xa4type") + 6
    return head[start : start + (head[start - 1] & 0x1F)].decode()


def decoded(frames: list[memoryview], kind: type[M]) -> M:
    """The message, which is of this kind."""
    return msgspec.convert(msgpack.unpackb(frames[0]), kind)


class Pipe:
    """One direction of a dealer's connection. `is_full`: it takes no more until a test says so."""

    def __init__(self, dealer: SimDealer, high_water_mark: int, *, to_router: bool) -> None:
        self.dealer = dealer
        self.to_router = to_router
        ends = [dealer.name, dealer.endpoint]
        self.name = ">".join(ends if to_router else reversed(ends))  # the same in each run
        self.high_water_mark = high_water_mark
        self.is_full = False
        self.last_at = 0.0
        self.waiting: list[Parcel] = []  # have arrived where nobody takes them yet
        self._num_sent = 0
        self._num_taken = 0

    def take(self) -> bool:
        """Room for one more message, if there is any."""
        low_water_mark = (self.high_water_mark + 1) // 2
        told = self._num_taken // low_water_mark * low_water_mark
        if self.is_full or self._num_sent - told >= self.high_water_mark:
            return False
        self._num_sent += 1
        return True

    def settle(self, num_copies: int) -> None:
        """Of the message that was just taken in, so many will come out."""
        self._num_sent += num_copies - 1

    def taken(self) -> None:
        """A message has left the pipe."""
        self._num_taken += 1


@dataclass(slots=True, eq=False)
class Connection:
    """From connect, or connect again, to a break or the end."""

    identity: bytes
    incoming: Pipe
    ended_at: float = math.inf
    is_broken: bool = False  # what is under way is lost


@dataclass(slots=True, eq=False)
class Parcel:
    """A message under way."""

    connection: Connection
    frames: list[memoryview]


class SimNetwork:
    """Carries messages between dealers and routers. Each takes a time of its own, by seed.

    `loses_on_close`: what is on its way to a router that closes is lost. Without, the next router
    at the endpoint gets it, as it does what ZeroMQ had not written to the connection yet.
    """

    def __init__(self, seed: int, high_water_mark: int = HIGH_WATER_MARK) -> None:
        self.high_water_mark = high_water_mark
        self.loses_on_close = False
        self.names: dict[int, str] = {}  # of processes
        self.routers: dict[str, SimRouter] = {}
        self.dealers: list[SimDealer] = []  # the open ones
        self.listeners: list[Listener] = []
        self.num_messages = 0
        self.num_lost = 0  # with connections that broke
        self.num_refused = 0  # by full pipes
        self._random = random.Random(seed)
        self._delays: list[tuple[PipeTest, float, float]] = []
        self._disturbances: list[Disturbance] = []
        self._waiting: dict[Pipe, None] = {}  # pipes in which messages wait
        self._num_endpoints = 0
        self._num_connections = 0
        self._context = Context()  # deliveries are nobody's: they run while a process is stopped

    # ---- what a test sees and does ----------------------------------------------------------

    def router_of(self, pid: int) -> SimRouter:
        """The only router that a process has bound."""
        (router,) = (router for router in self.routers.values() if router.pid == pid)
        return router

    def dealer(self, pid: int, endpoint: str) -> SimDealer:
        """The only dealer of a process that is connected to an endpoint."""
        (dealer,) = (d for d in self.dealers if d.pid == pid and d.endpoint == endpoint)
        return dealer

    def receiver_of(self, pipe: Pipe) -> int:
        """The process at the end of a pipe; 0 if nobody is there."""
        if not pipe.to_router:
            return pipe.dealer.pid
        router = self.routers.get(pipe.dealer.endpoint)
        return 0 if router is None else router.pid

    def num_waiting(self, pid: int) -> int:
        """Messages that have come and that the process does not take."""
        return sum(len(p.waiting) for p in self._waiting if self.receiver_of(p) == pid)

    def delay(self, pipes: PipeTest, low_s: float, high_s: float) -> None:
        """From now on what is sent into these pipes takes between `low_s` and `high_s` seconds. Of
        several rules for a pipe the latest holds."""
        self._delays.append((pipes, low_s, high_s))

    def begin(self, disturbance: Disturbance) -> None:
        """Disturb pipes until `end`."""
        self._disturbances.append(disturbance)

    def end(self, disturbance: Disturbance) -> None:
        self._disturbances.remove(disturbance)
        self.look_again()

    def look_again(self) -> None:
        """Deliver what waited and need not any more."""
        for pipe in self._waiting:
            virtual_loop().call_soon(self._deliver_waiting, pipe, context=self._context)

    def break_link(self, dealer: SimDealer) -> None:
        """The connection breaks. What was under way is lost, and the dealer comes back under
        another routing id, which the router does not know before it hears from it."""
        dealer.connection.ended_at = virtual_loop().time()
        dealer.connection.is_broken = True
        dealer.connect()

    def kill(self, pid: int) -> None:
        """All sockets of a process close. What it has sent arrives."""
        for router in [router for router in self.routers.values() if router.pid == pid]:
            router.close()
        for dealer in [dealer for dealer in self.dealers if dealer.pid == pid]:
            dealer.close()

    # ---- what sockets do --------------------------------------------------------------------

    def new_endpoint(self, pid: int) -> str:
        self._num_endpoints += 1
        return f"sim://{self.names.get(pid, pid)}/{self._num_endpoints}"

    def new_connection(self, dealer: SimDealer) -> Connection:
        self._num_connections += 1
        incoming = Pipe(dealer, self.high_water_mark, to_router=False)
        return Connection(b"peer-%d" % self._num_connections, incoming)

    def bind(self, router: SimRouter) -> None:
        if router.endpoint in self.routers:
            raise TransportError(f"cannot bind {router.endpoint}: already in use")
        self.routers[router.endpoint] = router
        self.look_again()

    def unbind(self, router: SimRouter) -> None:
        if self.routers.get(router.endpoint) is not router:
            return
        del self.routers[router.endpoint]
        for dealer in self.dealers:
            if dealer.endpoint == router.endpoint:
                dealer.connection.is_broken = self.loses_on_close
                dealer.connect()

    def carry(self, pipe: Pipe, connection: Connection, frames: Frames) -> bool:
        """Deliver later, after all that went into the pipe before. False if it is full."""
        if not pipe.take():
            self.num_refused += 1
            return False
        message = [memoryview(bytes(frame)) for frame in frames]
        delay_s, copies = self._delay_of(pipe), [(0.0, message)]
        for disturbance in self._disturbances:
            if disturbance.pipes(pipe):
                delay_s = disturbance.delay_s or delay_s
                instead = disturbance.on_send(message)
                copies = copies if instead is None else instead
        pipe.settle(len(copies))
        for later_s, each in copies:
            parcel = Parcel(connection, each)
            if later_s:
                loop = virtual_loop()
                loop.call_later(later_s, self._send, pipe, parcel, delay_s, context=self._context)
            else:
                self._send(pipe, parcel, delay_s)
        return True

    def _send(self, pipe: Pipe, parcel: Parcel, delay_s: tuple[float, float]) -> None:
        loop = virtual_loop()
        self.num_messages += 1
        arrives_at = loop.time() + self._random.uniform(*delay_s)
        # Timers of equal times run in no order, so each message is a little later than the last.
        pipe.last_at = max(pipe.last_at + 1e-7, arrives_at)
        loop.call_at(pipe.last_at, self._arrive, pipe, parcel, context=self._context)

    def _delay_of(self, pipe: Pipe) -> tuple[float, float]:
        ranges = ((low, high) for pipes, low, high in reversed(self._delays) if pipes(pipe))
        return next(ranges, USUAL_DELAY_S)

    def _arrive(self, pipe: Pipe, parcel: Parcel) -> None:
        if pipe.waiting or self._must_wait(pipe):
            for each in self._disturbances:
                each.num_struck += each.holds and each.pipes(pipe)
            pipe.waiting.append(parcel)
            self._waiting[pipe] = None
        else:
            self._deliver(pipe, parcel)

    def _must_wait(self, pipe: Pipe) -> bool:
        receiver = self.receiver_of(pipe)
        if not receiver or virtual_loop().is_stopped(receiver):
            return True
        return any(each.holds and each.pipes(pipe) for each in self._disturbances)

    def _deliver_waiting(self, pipe: Pipe) -> None:
        while pipe.waiting and not self._must_wait(pipe):
            self._deliver(pipe, pipe.waiting.pop(0))
        if not pipe.waiting:
            self._waiting.pop(pipe, None)

    def _deliver(self, pipe: Pipe, parcel: Parcel) -> None:
        pipe.taken()
        dealer, connection, frames = pipe.dealer, parcel.connection, parcel.frames
        if connection.is_broken or not (pipe.to_router or dealer.is_open):
            self.num_lost += 1
            return
        for listener in self.listeners:
            listener(pipe, frames)
        if not pipe.to_router:
            dealer.context.run(dealer.handler, frames)
        elif (router := self.routers.get(dealer.endpoint)) is not None:
            if connection.ended_at == math.inf:
                connection = dealer.connection
            router.peers[connection.identity] = connection
            router.context.run(router.handler, connection.identity, frames, "")


class SimRouter:
    """Implements transport.RouterSocket."""

    def __init__(
        self, network: SimNetwork, pid: int, endpoint: str, handler: RouterHandler
    ) -> None:
        wants_any = endpoint.endswith((":*", ":0"))
        self.endpoint = network.new_endpoint(pid) if wants_any else endpoint
        self.pid = pid
        self.handler = handler
        self.context = copy_context()
        self.peers: dict[bytes, Connection] = {}
        self._network = network
        network.bind(self)

    def send(self, peer: bytes, frames: Frames) -> bool:
        connection = self.peers.get(peer)
        if connection is None:
            return False
        if asyncio.get_running_loop().time() > connection.ended_at + NOTICE_S:
            del self.peers[peer]
            return False
        return self._network.carry(connection.incoming, connection, frames)

    def close(self) -> None:
        self._network.unbind(self)
        self.peers.clear()


class SimDealer:
    """Implements transport.DealerSocket."""

    def __init__(
        self,
        network: SimNetwork,
        pid: int,
        endpoint: str,
        handler: DealerHandler,
        lost: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.pid = pid
        self.name = network.names.get(pid, str(pid))
        self.handler = handler
        self._lost = lost
        self.context = copy_context()
        self.is_open = True
        self.outgoing = Pipe(self, network.high_water_mark, to_router=True)
        self._network = network
        network.dealers.append(self)
        self.connection = network.new_connection(self)

    @property
    def incoming(self) -> Pipe:
        return self.connection.incoming

    def connect(self) -> None:
        """Begin a new connection after one that is gone."""
        last_at = self.incoming.last_at
        self.connection = self._network.new_connection(self)
        self.incoming.last_at = last_at
        if self._lost is not None:
            virtual_loop().call_later(NOTICE_S, self._tell_lost, context=self.context)

    def _tell_lost(self) -> None:
        if self.is_open and self._lost is not None:
            self._lost()

    def send(self, frames: Frames) -> bool:
        return self.is_open and self._network.carry(self.outgoing, self.connection, frames)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.connection.ended_at = asyncio.get_running_loop().time()
            self._network.dealers.remove(self)


class SimTransport:
    """The sockets of one process. No keys are used: each is who it says it is."""

    def __init__(self, network: SimNetwork, pid: int) -> None:
        self._network = network
        self._pid = pid

    def router(
        self,
        endpoint: str,
        handler: RouterHandler,
        _max_frame_bytes: int = 0,
        _slow_reader_s: float | None = None,
    ) -> SimRouter:
        return SimRouter(self._network, self._pid, endpoint, handler)

    def dealer(
        self,
        endpoint: str,
        handler: DealerHandler,
        lost: Callable[[], None] | None = None,
        _role: str = "",
    ) -> SimDealer:
        return SimDealer(self._network, self._pid, endpoint, handler, lost)

    def close(self) -> None:
        """Sockets are closed by their owners."""
