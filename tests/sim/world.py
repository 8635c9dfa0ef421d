"""The seams of a simulated world: one thread, virtual time, seeded chance, memory for a network."""

from __future__ import annotations

import asyncio
import os
import random
import selectors
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common.kv.arena import ArenaError, LiveDisk
from common.net.transport import DealerHandler, Frames, RouterHandler, TransportError
from common.service import Seams


class NothingLeftError(Exception):
    """Every task waits for something that no timer will bring: a hang."""


class _JumpingSelector(selectors.SelectSelector):
    """Where a live loop would wait, time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise NothingLeftError
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now


class SimClock:
    def now(self) -> float:
        return asyncio.get_running_loop().time()


class SimRng:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def new_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def new_seed(self) -> int:
        return self._random.getrandbits(63)


class SimDisk(LiveDisk):
    """Arenas without names in any file system."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def remove_arena(self, path: str) -> None:
        descriptor = self._files.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def sweep_arenas(self, folder: str) -> list[str]:
        return []

    def _create(self, path: str) -> int:
        self._files[path] = os.memfd_create("arena")
        return os.dup(self._files[path])

    def _open(self, path: str) -> int:
        if path not in self._files:
            raise ArenaError(f"no arena {path}")
        return os.dup(self._files[path])


class SimProcesses:
    """Processes are numbers; `end` is what SIGKILL would do to one."""

    def __init__(self) -> None:
        self._callbacks: dict[int, list[Callable[[], None]]] = defaultdict(list)

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        callbacks = self._callbacks[pid]
        callbacks.append(callback)
        return lambda: callbacks.remove(callback) if callback in callbacks else None

    def end(self, pid: int) -> None:
        for callback in list(self._callbacks.pop(pid, [])):
            callback()


class SimNetwork:
    """Pipes between dealers and routers: each keeps its order, and each message takes its time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.routers: dict[str, SimRouter] = {}
        self.num_messages = 0
        self._num_endpoints = 0
        self._num_dealers = 0
        self._unbound: dict[str, list[Callable[[], None]]] = defaultdict(list)

    def new_endpoint(self) -> str:
        self._num_endpoints += 1
        return f"sim://{self._num_endpoints}"

    def new_identity(self) -> bytes:
        self._num_dealers += 1
        return b"dealer-%d" % self._num_dealers

    def carry(self, pipe: Pipe, deliver: Callable[[], None]) -> None:
        """Deliver later, after all that went into the pipe before."""
        loop = asyncio.get_running_loop()
        self.num_messages += 1
        # Timers of equal times run in no order, so each message is a little later than the last.
        arrives_at = loop.time() + self._random.uniform(50e-6, 2e-3)
        pipe.last_at = max(pipe.last_at + 1e-7, arrives_at)
        loop.call_at(pipe.last_at, deliver)

    def when_bound(self, endpoint: str, deliver: Callable[[], None]) -> None:
        """ZeroMQ keeps what is sent before the other end is there."""
        self._unbound[endpoint].append(deliver)

    def bind(self, router: SimRouter) -> None:
        if router.endpoint in self.routers:
            raise TransportError(f"cannot bind {router.endpoint}: already in use")
        self.routers[router.endpoint] = router
        for deliver in self._unbound.pop(router.endpoint, []):
            asyncio.get_running_loop().call_soon(deliver)


class Pipe:
    """One direction of a connection."""

    def __init__(self) -> None:
        self.last_at = 0.0


def _copied(frames: Frames) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in frames]


class SimRouter:
    def __init__(self, network: SimNetwork, endpoint: str, handler: RouterHandler) -> None:
        wants_any = endpoint.endswith((":*", ":0"))
        self.endpoint = network.new_endpoint() if wants_any else endpoint
        self.handler = handler
        self.dealers: dict[bytes, SimDealer] = {}
        self.is_open = True
        self._network = network
        network.bind(self)

    def send(self, peer: bytes, frames: Frames) -> bool:
        dealer = self.dealers.get(peer)
        if dealer is None or not dealer.is_open or not self.is_open:
            return False
        message = _copied(frames)

        def deliver() -> None:
            if dealer.is_open:
                dealer.handler(message)

        self._network.carry(dealer.incoming, deliver)
        return True

    def close(self) -> None:
        self.is_open = False
        self.dealers.clear()
        if self._network.routers.get(self.endpoint) is self:
            del self._network.routers[self.endpoint]


class SimDealer:
    def __init__(self, network: SimNetwork, endpoint: str, handler: DealerHandler) -> None:
        self.endpoint = endpoint
        self.handler = handler
        self.identity = network.new_identity()
        self.incoming, self._outgoing = Pipe(), Pipe()
        self.is_open = True
        self._network = network

    def send(self, frames: Frames) -> bool:
        if not self.is_open:
            return False
        message = _copied(frames)

        def deliver() -> None:
            router = self._network.routers.get(self.endpoint)
            if router is None:
                self._network.when_bound(self.endpoint, deliver)
            else:
                router.dealers[self.identity] = self
                router.handler(self.identity, message)

        self._network.carry(self._outgoing, deliver)
        return True

    def close(self) -> None:
        self.is_open = False


class SimTransport:
    def __init__(self, network: SimNetwork) -> None:
        self._network = network

    def router(self, endpoint: str, handler: RouterHandler) -> SimRouter:
        return SimRouter(self._network, endpoint, handler)

    def dealer(self, endpoint: str, handler: DealerHandler) -> SimDealer:
        return SimDealer(self._network, endpoint, handler)

    def close(self) -> None:
        """Sockets are closed by their owners."""


class World:
    """One seed's world. Each process gets its seams from it."""

    def __init__(self, seed: int) -> None:
        self.network = SimNetwork(seed)
        self.disk = SimDisk()
        self.processes = SimProcesses()
        self.random = random.Random(seed + 1)
        self._rng = SimRng(seed + 2)
        self._num_processes = 0

    def seams(self) -> Seams:
        self._num_processes += 1
        return Seams(
            transport=SimTransport(self.network),
            clock=SimClock(),
            rng=self._rng,
            disk=self.disk,
            processes=self.processes,
            host_id="host",
            pid=self._num_processes,
        )
