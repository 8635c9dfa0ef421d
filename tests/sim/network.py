"""A network in memory, after ZeroMQ: what is sent arrives in order, and a test may disturb it.

Connections can be slowed (`delay`), full (`Pipe.is_full`), broken (`break_link`) or gone with their
process (`kill`). `listeners` are called with all that is delivered.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

from common.net.transport import DealerHandler, Frames, RouterHandler, TransportError

USUAL_DELAY_S = (50e-6, 2e-3)

PipeTest = Callable[["Pipe"], bool]
Listener = Callable[["Pipe", list[memoryview]], None]


class Pipe:
    """One direction of a dealer's connection. `is_full`: it takes no more until a test says so."""

    def __init__(self, dealer: SimDealer, *, to_router: bool) -> None:
        self.dealer = dealer
        self.to_router = to_router
        self.is_full = False
        self.is_broken = False
        self.last_at = 0.0


class SimNetwork:
    """Carries messages between dealers and routers. Each takes a time of its own, by seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._delays: list[tuple[PipeTest, float, float]] = []
        self._num_endpoints = 0
        self._num_dealers = 0
        self._unbound: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.routers: dict[str, SimRouter] = {}
        self.dealers: list[SimDealer] = []  # the open ones
        self.listeners: list[Listener] = []
        self.num_messages = 0
        self.num_lost = 0  # with connections that broke
        self.num_refused = 0  # by full pipes

    # ---- what a test sees and does ----------------------------------------------------------

    def router_of(self, pid: int) -> SimRouter:
        """The only router that a process has bound."""
        (router,) = (router for router in self.routers.values() if router.pid == pid)
        return router

    def dealer(self, pid: int, endpoint: str) -> SimDealer:
        """The only dealer of a process that is connected to an endpoint."""
        (dealer,) = (d for d in self.dealers if d.pid == pid and d.endpoint == endpoint)
        return dealer

    def delay(self, pipes: PipeTest, low_s: float, high_s: float) -> None:
        """From now on what is sent into these pipes takes between `low_s` and `high_s` seconds. Of
        several rules for a pipe the latest holds."""
        self._delays.append((pipes, low_s, high_s))

    def break_link(self, dealer: SimDealer) -> None:
        """The connection breaks. What was under way is lost, and the dealer comes back under
        another routing id, which the router does not know before it hears from it."""
        router = self.routers.get(dealer.endpoint)
        if router is not None:
            router.dealers.pop(dealer.identity, None)
        dealer.incoming.is_broken = dealer.outgoing.is_broken = True
        dealer.connect()

    def kill(self, pid: int) -> None:
        """All sockets of a process close. What it has sent arrives."""
        for router in [router for router in self.routers.values() if router.pid == pid]:
            router.close()
        for dealer in [dealer for dealer in self.dealers if dealer.pid == pid]:
            dealer.close()

    # ---- what sockets do --------------------------------------------------------------------

    def new_endpoint(self) -> str:
        self._num_endpoints += 1
        return f"sim://{self._num_endpoints}"

    def new_identity(self) -> bytes:
        self._num_dealers += 1
        return b"dealer-%d" % self._num_dealers

    def bind(self, router: SimRouter) -> None:
        if router.endpoint in self.routers:
            raise TransportError(f"cannot bind {router.endpoint}: already in use")
        self.routers[router.endpoint] = router
        for deliver in self._unbound.pop(router.endpoint, []):
            asyncio.get_running_loop().call_soon(deliver)

    def carry(self, pipe: Pipe, frames: Frames) -> bool:
        """Deliver later, after all that went into the pipe before. False if it is full."""
        if pipe.is_full:
            self.num_refused += 1
            return False
        loop = asyncio.get_running_loop()
        self.num_messages += 1
        message = [memoryview(bytes(frame)) for frame in frames]
        # Timers of equal times run in no order, so each message is a little later than the last.
        pipe.last_at = max(pipe.last_at + 1e-7, loop.time() + self._delay_s(pipe))
        loop.call_at(pipe.last_at, self._deliver, pipe, message)
        return True

    def _delay_s(self, pipe: Pipe) -> float:
        ranges = ((low, high) for pipes, low, high in reversed(self._delays) if pipes(pipe))
        return self._random.uniform(*next(ranges, USUAL_DELAY_S))

    def _deliver(self, pipe: Pipe, message: list[memoryview]) -> None:
        dealer = pipe.dealer
        router = self.routers.get(dealer.endpoint)
        if pipe.is_broken:
            self.num_lost += 1
        elif pipe.to_router and router is None:
            # ZeroMQ keeps what is sent before the other end is there.
            self._unbound[dealer.endpoint].append(lambda: self._deliver(pipe, message))
        elif pipe.to_router or dealer.is_open:
            for listener in self.listeners:
                listener(pipe, message)
            if not pipe.to_router:
                dealer.handler(message)
            elif router is not None:
                router.dealers[dealer.identity] = dealer
                router.handler(dealer.identity, message)


class SimRouter:
    """Implements transport.RouterSocket."""

    def __init__(
        self, network: SimNetwork, pid: int, endpoint: str, handler: RouterHandler
    ) -> None:
        wants_any = endpoint.endswith((":*", ":0"))
        self.endpoint = network.new_endpoint() if wants_any else endpoint
        self.pid = pid
        self.handler = handler
        self.dealers: dict[bytes, SimDealer] = {}
        self._network = network
        network.bind(self)

    def send(self, peer: bytes, frames: Frames) -> bool:
        dealer = self.dealers.get(peer)
        if dealer is None or not dealer.is_open:
            return False
        return self._network.carry(dealer.incoming, frames)

    def close(self) -> None:
        self.dealers.clear()
        if self._network.routers.get(self.endpoint) is self:
            del self._network.routers[self.endpoint]


class SimDealer:
    """Implements transport.DealerSocket."""

    def __init__(
        self, network: SimNetwork, pid: int, endpoint: str, handler: DealerHandler
    ) -> None:
        self.endpoint = endpoint
        self.pid = pid
        self.handler = handler
        self.is_open = True
        self._network = network
        network.dealers.append(self)
        self.connect()

    def connect(self) -> None:
        """Begin a new connection, as at first and after each break."""
        self.identity = self._network.new_identity()
        self.incoming = Pipe(self, to_router=False)
        self.outgoing = Pipe(self, to_router=True)

    def send(self, frames: Frames) -> bool:
        return self.is_open and self._network.carry(self.outgoing, frames)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._network.dealers.remove(self)


class SimTransport:
    """The sockets of one process."""

    def __init__(self, network: SimNetwork, pid: int) -> None:
        self._network = network
        self._pid = pid

    def router(self, endpoint: str, handler: RouterHandler) -> SimRouter:
        return SimRouter(self._network, self._pid, endpoint, handler)

    def dealer(self, endpoint: str, handler: DealerHandler) -> SimDealer:
        return SimDealer(self._network, self._pid, endpoint, handler)

    def close(self) -> None:
        """Sockets are closed by their owners."""
