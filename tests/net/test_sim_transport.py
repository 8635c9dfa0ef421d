"""The network in memory against ZeroMQ: the same script over both transports, the same outcome.

What only time decides, such as what is lost when a connection breaks, is compared as a rule that
both keep: what comes has been sent, in that order, and nothing twice.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.net.transport import DealerSocket, RouterSocket, Transport, TransportError
from common.net.zmq_transport import ZmqTransport
from kvbaton.sockets import COPY_BELOW_BYTES, HIGH_WATER_MARK
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


class Net:
    """One of the two worlds: a new transport for each process, an endpoint, and a way to cut."""

    endpoint: str

    def transport(self) -> Transport:
        raise NotImplementedError

    async def weak_endpoint(self) -> str:
        """Leads to `endpoint`, over connections that `cut` breaks."""
        raise NotImplementedError

    def cut(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to close."""


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


def is_in_order(received: list[list[bytes]], sent: list[list[bytes]]) -> bool:
    """Whether what was received is what was sent, without some of it."""
    rest = iter(sent)
    return all(message in rest for message in received)


def numbered(count: int, start: int = 0) -> list[list[bytes]]:
    return [[str(number).encode()] for number in range(start, start + count)]


_NAMES = st.sampled_from(["a", "b", "c"])
_FRAMES = st.lists(
    st.binary(max_size=40) | st.sampled_from([bytes(COPY_BELOW_BYTES), b"x" * 200_000]),
    min_size=1,
    max_size=4,
).filter(lambda frames: frames[0] != FENCE)
_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("up"), _NAMES, _FRAMES),
        st.tuples(st.just("down"), _NAMES, _FRAMES),
        st.tuples(st.sampled_from(["many up", "many down"]), _NAMES, st.integers(2, 150)),
        st.tuples(st.sampled_from(["fence", "come or go", "stranger"]), _NAMES, st.none()),
    ),
    max_size=25,
)


@given(_OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_whatever_is_sent_comes_alike(operations: list[tuple[str, str, Any]]) -> None:
    async def script(ends: Ends) -> Any:
        results: list[bool] = []
        former: list[bytes] = []
        here = {"a", "b", "c"}
        ends.bind()
        for name in ("a", "b", "c", "witness"):
            ends.connect(name)
            await ends.fence(name)
        for kind, name, what in operations:
            if kind == "come or go":
                await (leave(ends, name, former) if name in here else come(ends, name))
                here ^= {name}
            elif kind == "stranger":
                results += [ends.send_to(peer, [b"x"]) for peer in (b"nobody", *former)]
            elif kind.endswith("down"):
                messages = numbered(what) if kind == "many down" else [what]
                results += [ends.send_to(ends.peers[name], each) for each in messages]
            elif name in here:
                messages = numbered(what) if kind == "many up" else [what]
                results += [ends.send(name, each) for each in messages if kind != "fence"]
                if kind == "fence":
                    await ends.fence(name)
        for name in (*here, "witness"):  # who left last is read, if not before, with who is here
            await ends.fence(name)
        return results, ends.up, ends.down

    async def come(ends: Ends, name: str) -> None:
        ends.connect(name)
        await ends.fence(name)

    async def leave(ends: Ends, name: str, former: list[bytes]) -> None:
        await ends.fence(name)
        ends.send(name, [b"last words"])
        former.append(ends.peers[name])
        ends.close(name)
        await ends.refused(ends.peers[name], "witness")

    in_memory, live = on_both(script)
    assert in_memory == live


def test_a_dealer_keeps_as_much_for_a_router_that_is_not_there_yet() -> None:
    async def script(ends: Ends) -> Any:
        ends.connect("early")
        num_taken = 0
        while ends.send("early", [str(num_taken).encode()]):
            num_taken += 1
        ends.bind()
        await ends.fence("early")
        again = ends.send("early", [b"again"])
        await ends.fence("early")
        return num_taken, again, ends.up

    in_memory, live = on_both(script)
    assert in_memory == live
    assert in_memory[0] == HIGH_WATER_MARK


@pytest.mark.parametrize("direction", ["up", "down"])
def test_who_does_not_read_fills_the_pipe_and_all_that_was_taken_comes_in_order(
    direction: Literal["up", "down"],
) -> None:
    """Nobody reads while the sender does not wait. How much ZeroMQ's own buffers take differs."""

    async def script(ends: Ends) -> bool:
        ends.bind()
        ends.connect("other")
        ends.connect("slow")
        await ends.fence("other")
        await ends.fence("slow")

        def send(message: list[bytes]) -> bool:
            if direction == "up":
                return ends.send("slow", message)
            return ends.send_to(ends.peers["slow"], message)

        frame, num_taken = bytes(1024), 0
        while send([str(num_taken).encode(), frame]):
            num_taken += 1
        assert num_taken > HIGH_WATER_MARK // 2
        assert ends.send_to(ends.peers["other"], [b"still served"])
        received = (ends.up if direction == "up" else ends.down)["slow"]
        async with asyncio.timeout(PATIENCE_S):
            while len(received) < num_taken:
                await ends.fence("other")
        await ends.fence("slow")
        assert [message[0] for message in received] == [m[0] for m in numbered(num_taken)]
        return send([b"again", frame])

    assert on_both(script) == (True, True)


def test_a_router_bound_anew_knows_nobody_and_hears_of_everybody() -> None:
    async def script(ends: Ends) -> Any:
        ends.bind()
        for name in ("a", "b"):
            ends.connect(name)
            await ends.fence(name)
        former = dict(ends.peers)
        ends.unbind()
        sent = numbered(20)
        taken = [ends.send("a", message) for message in sent]
        ends.bind()
        await ends.fence("a")
        await ends.fence("b")
        known = [ends.send_to(peer, [b"x"]) for peer in former.values()]
        late = [ends.send("a", [b"late"]), ends.send_to(ends.peers["a"], [b"late"])]
        await ends.fence("a")
        assert is_in_order(ends.up["a"], [*sent, [b"late"]])
        assert ends.up["a"][-1] == [b"late"]
        return taken, known, late, ends.down, [former[name] == ends.peers[name] for name in "ab"]

    in_memory, live = on_both(script)
    assert in_memory == live
    assert in_memory[1] == [False, False]


@pytest.mark.parametrize("num_cuts", [1, 3])
def test_a_cut_connection_loses_what_is_under_way_and_comes_back_as_another(num_cuts: int) -> None:
    async def script(ends: Ends) -> Any:
        ends.bind()
        ends.connect("weak", await ends.net.weak_endpoint())
        await ends.fence("weak")
        outcome, sent_up, sent_down = [], [], []
        for number in range(num_cuts):
            former = ends.peers["weak"]
            messages = numbered(50, 100 * number)
            sent_up += messages
            sent_down += messages
            taken = [ends.send("weak", m) for m in messages]
            taken += [ends.send_to(former, m) for m in messages]
            ends.net.cut()
            await ends.fence("weak")  # over the next connection
            await ends.refused(former, "weak")
            late = [str(100 * number + 50).encode()]
            sent_up.append(late)
            sent_down.append(late)
            taken += [ends.send("weak", late), ends.send_to(ends.peers["weak"], late)]
            await ends.fence("weak")
            down = [message for message in ends.down["weak"] if message != [b"anyone?"]]
            assert is_in_order(ends.up["weak"], sent_up)
            assert is_in_order(down, sent_down)
            outcome += [taken, former == ends.peers["weak"], ends.up["weak"][-1], down[-1]]
        return outcome

    in_memory, live = on_both(script)
    assert in_memory == live


def test_an_endpoint_is_bound_once_at_a_time() -> None:
    async def script(ends: Ends) -> bool:
        ends.bind()
        with closing(ends.net.transport()) as second, pytest.raises(TransportError, match="in use"):
            second.router(ends.net.endpoint, lambda peer, frames, user: None)
        ends.unbind()
        ends.bind()
        ends.connect("a")
        await ends.fence("a")
        return ends.send("a", [b"x"])

    assert on_both(script) == (True, True)


def test_a_send_that_is_refused_does_not_make_the_router_deaf() -> None:
    """ZeroMQ takes notice of arrivals while it sends, also when it then refuses."""

    async def script(ends: Ends) -> int:
        ends.bind()
        ends.connect("a")
        await ends.fence("a")
        for _ in range(300):
            ends.send("a", [b"x"])
            assert not any(ends.send_to(b"nobody", [b"x"]) for _ in range(20))
            await ends.fence("a")
        return len(ends.up["a"])

    assert on_both(script) == (300, 300)
