"""A link and its server over wires that carry what a test lets them, when and how often."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from common.messages import (
    INTERNAL_VERSION,
    FromStore,
    GiveBack,
    Heartbeat,
    Hello,
    Leased,
    Member,
    Message,
    Ok,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.link import Link
from common.net.server import Server
from common.net.transport import DealerHandler, Frames, RouterHandler
from kvbaton.errors import KvbatonError, UnavailableError

PEER = b"peer"


class End:
    """One end's socket: what it sends waits in `under_way` until the test delivers it."""

    endpoint = "memory"

    def __init__(self) -> None:
        self.under_way: list[list[memoryview]] = []
        self.is_full = False

    def queue(self, frames: Frames) -> bool:
        if not self.is_full:
            self.under_way.append([memoryview(bytes(frame)) for frame in frames])
        return not self.is_full

    def close(self) -> None:
        """Nothing to close."""


class DealerEnd(End):
    def send(self, frames: Frames) -> bool:
        return self.queue(frames)


class RouterEnd(End):
    def send(self, _peer: bytes, frames: Frames) -> bool:
        return self.queue(frames)


class Wires:
    """A transport for one dealer and one router."""

    def __init__(self) -> None:
        self._router, self._dealer = RouterEnd(), DealerEnd()

    def router(
        self,
        _endpoint: str,
        handler: RouterHandler,
        _max_frame_bytes: int = 0,
        _slow_reader_s: float | None = None,
    ) -> RouterEnd:
        self._to_router = handler
        return self._router

    def dealer(
        self,
        _endpoint: str,
        handler: DealerHandler,
        _lost: Callable[[], None] | None = None,
        _role: str = "",
    ) -> DealerEnd:
        self._to_dealer = handler
        return self._dealer

    def close(self) -> None:
        """Nothing to close."""

    def end(self, to_server: bool) -> End:
        return self._dealer if to_server else self._router

    def lose(self, to_server: bool, index: int = 0) -> None:
        del self.end(to_server).under_way[index]

    def repeat(self, to_server: bool, index: int = 0) -> None:
        under_way = self.end(to_server).under_way
        under_way.append(under_way[index])

    def deliver(self, to_server: bool, index: int = 0) -> None:
        frames = self.end(to_server).under_way.pop(index)
        if to_server:
            self._to_router(PEER, frames, "")
        else:
            self._to_dealer(frames)

    def deliver_all(self) -> None:
        while self._dealer.under_way or self._router.under_way:
            self.deliver(bool(self._dealer.under_way))


class Pair:
    """A link and its server. Each side's messages tell the incarnation they were sent in, and which
    of its messages they are; what the other side handles is noted by incarnation."""

    def __init__(self) -> None:
        self.wires = Wires()
        self.sent: dict[int, int] = defaultdict(int)
        self.pushed: dict[int, int] = defaultdict(int)
        self.handled: dict[int, list[int]] = defaultdict(list)
        self.received: dict[int, list[int]] = defaultdict(list)
        self.num_hellos = 0
        self.num_accepted = 0
        self.num_refused = 0
        self.refuses = False
        self.welcomed: list[int] = []  # incarnations, as the link was told
        self.gone: list[int] = []
        self.server = Server(
            self.wires,
            "memory",
            decoder(ToStore),
            rights=RIGHTS["kvstore"],
            accept=self._accept,
            handle=self._handle,
            gone=lambda _peer, member: self.gone.append(member.pid),
        )
        self.link = Link(
            self.wires,
            "memory",
            decoder(FromStore),
            hello=self._hello,
            welcomed=lambda welcome: self.welcomed.append(int(welcome.instance_id)),
            handle=self._receive,
            refused=self._refused,
        )

    def _hello(self) -> Hello:
        self.num_hellos += 1
        member = Member(
            member_id="0" * 32, role="decode", name="d", host_id="h", pid=self.num_hellos
        )
        return Hello(internal_version=INTERNAL_VERSION, member=member)

    def _accept(self, _peer: bytes, hello: Hello) -> Welcome:
        if self.refuses:
            raise UnavailableError("not now", retry_after_s=1)
        self.num_accepted += 1
        return Welcome(instance_id=str(hello.member.pid))

    def _refused(self, _error: KvbatonError) -> None:
        self.num_refused += 1

    def _handle(self, peer: bytes, message: Message, _bulk: Sequence[memoryview]) -> Message:
        if isinstance(message, GiveBack):
            incarnation, index = message.blocks
            assert incarnation == self.server.peers[peer].pid
            self.handled[incarnation].append(index)
        return Ok()

    def _receive(self, message: Message) -> None:
        if isinstance(message, Leased):
            incarnation, index = message.blocks
            assert incarnation == self.welcomed[-1] == self.num_hellos
            self.received[incarnation].append(index)

    def send(self) -> None:
        incarnation = self.num_hellos
        message = GiveBack(blocks=[incarnation, self.sent[incarnation]])
        self.link.send(message)
        # A link that must greet again does so first; its message is then lost or belongs there.
        self.sent[incarnation] += 1

    def push(self) -> None:
        member = self.server.peers.get(PEER)
        if member is not None:
            self.server.send(PEER, Leased(blocks=[member.pid, self.pushed[member.pid]]))
            self.pushed[member.pid] += 1

    async def ask(self) -> Message:
        call = asyncio.ensure_future(self.link.call(Heartbeat()))
        await asyncio.sleep(0)
        self.wires.deliver_all()
        return await asyncio.wait_for(call, 1)

    async def recovers(self) -> None:
        """A heartbeat may fail and bring about the hello; the next is answered."""
        for _ in range(3):
            call = asyncio.ensure_future(self.link.call(Heartbeat()))
            await asyncio.sleep(0)
            self.wires.deliver_all()
            await asyncio.sleep(0)
            if call.done() and call.exception() is None:
                break
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert isinstance(await self.ask(), Ok)
        assert self.welcomed[-1] == self.server.peers[PEER].pid == self.num_hellos

    def check(self) -> None:
        """Each incarnation's messages were handled once, in order, none left out."""
        for sent, came in ((self.sent, self.handled), (self.pushed, self.received)):
            for incarnation, indices in came.items():
                assert indices == list(range(len(indices)))
                assert len(indices) <= sent[incarnation]
        assert self.welcomed == sorted(set(self.welcomed))
        assert self.gone == sorted(set(self.gone))


def run(scenario: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        pair = Pair()
        await scenario(pair)
        pair.link.close()

    asyncio.run(main())
