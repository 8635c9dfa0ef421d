"""The ends of connections, over the network in memory and over ZeroMQ: a script runs on both."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from common.net.transport import DealerSocket, RouterSocket, Transport
from common.net.zmq_transport import ZmqTransport
from tests.ports import free_port
from tests.sim.cluster import simulate
from tests.sim.network import SimNetwork, SimTransport

T = TypeVar("T")

PATIENCE_S = 20.0
FENCE = b"fence"


class Relay:
    """A TCP connection's way to the router, which a test can cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, to_writer]
        await asyncio.gather(self._copy(reader, to_writer), self._copy(to_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()


class Net(ABC):
    """One of the two worlds: a new transport for each process, an endpoint, and a way to cut."""

    endpoint: str

    @abstractmethod
    def transport(self) -> Transport:
        """For one process."""

    @abstractmethod
    async def weak_endpoint(self) -> str:
        """Leads to `endpoint`, over connections that `cut` breaks."""

    @abstractmethod
    def cut(self) -> None:
        """Break them."""

    @abstractmethod
    def close(self) -> None:
        """The end of this world."""


class LiveNet(Net):
    def __init__(self) -> None:
        self._port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self._port}"
        self._relay: Relay | None = None

    def transport(self) -> Transport:
        return ZmqTransport()

    async def weak_endpoint(self) -> str:
        self._relay = Relay(self._port)
        return await self._relay.start()

    def cut(self) -> None:
        assert self._relay is not None
        self._relay.cut()

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()


class SimNet(Net):
    endpoint = "sim://router"

    def __init__(self) -> None:
        self._network = SimNetwork(1)
        self._pids = itertools.count(1)

    def transport(self) -> Transport:
        return SimTransport(self._network, next(self._pids))

    async def weak_endpoint(self) -> str:
        return self.endpoint

    def cut(self) -> None:
        for dealer in self._network.dealers:
            self._network.break_link(dealer)

    def close(self) -> None:
        """Nothing to close."""


class Ends:
    """A router and dealers with names. `up` and `down` have what came, by name, without fences."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.up: defaultdict[str, list[list[bytes]]] = defaultdict(list)
        self.down: defaultdict[str, list[list[bytes]]] = defaultdict(list)
        self.peers: dict[str, bytes] = {}  # under which the router heard of each dealer last
        self._router: tuple[Transport, RouterSocket] | None = None
        self._dealers: dict[str, tuple[Transport, DealerSocket]] = {}
        self._fences: dict[bytes, asyncio.Event] = {}

    def bind(self) -> None:
        transport = self.net.transport()
        self._router = transport, transport.router(self.net.endpoint, self._on_router)

    def unbind(self) -> None:
        assert self._router is not None
        transport, router = self._router
        self._router = None
        router.close()
        transport.close()

    def connect(self, name: str, endpoint: str = "") -> None:
        transport = self.net.transport()

        def on_dealer(frames: list[memoryview]) -> None:
            message = [bytes(frame) for frame in frames]
            if message[0] == FENCE:
                self._fences[message[1]].set()
            else:
                self.down[name].append(message)

        dealer = transport.dealer(endpoint or self.net.endpoint, on_dealer)
        self._dealers[name] = transport, dealer

    def _on_router(self, peer: bytes, frames: list[memoryview], _user: str) -> None:
        name, *message = [bytes(frame) for frame in frames]
        self.peers[name.decode()] = peer
        if message and message[0] == FENCE:
            self.send_to(peer, message)
        else:
            self.up[name.decode()].append(message)

    def send(self, name: str, message: list[Any]) -> bool:
        return self._dealers[name][1].send([name.encode(), *message])

    def send_to(self, peer: bytes, message: list[Any]) -> bool:
        assert self._router is not None
        return self._router[1].send(peer, message)

    async def fence(self, name: str) -> None:
        """All that was sent before, on this dealer's pipes, has come or never will."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                number = str(len(self._fences)).encode()
                passed = self._fences[number] = asyncio.Event()
                is_taken = self.send(name, [FENCE, number])
                try:
                    async with asyncio.timeout(0.5 if is_taken else 0.01):
                        await passed.wait()
                        return
                except TimeoutError:
                    pass  # lost with a connection, or there was no room for it

    async def refused(self, peer: bytes, witness: str) -> None:
        """The router has noticed that this peer is gone."""
        async with asyncio.timeout(PATIENCE_S):
            while self.send_to(peer, [b"anyone?"]):
                await self.fence(witness)

    def close(self, name: str) -> None:
        transport, dealer = self._dealers.pop(name)
        dealer.close()
        transport.close()

    def close_all(self) -> None:
        for name in list(self._dealers):
            self.close(name)
        if self._router is not None:
            self.unbind()
        self.net.close()


Script = Callable[[Ends], Awaitable[T]]


def on_both(script: Script[T]) -> tuple[T, T]:
    """What the script returns in memory, and over ZeroMQ."""

    async def main(make_net: Callable[[], Net]) -> T:
        ends = Ends(make_net())
        try:
            return await script(ends)
        finally:
            ends.close_all()

    return simulate(main(SimNet)), asyncio.run(main(LiveNet))
