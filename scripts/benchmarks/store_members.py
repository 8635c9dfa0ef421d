"""A real store process on a core of its own, and its members, all of which are in this process."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from common.kv.layout import KvLayout
from common.messages import INTERNAL_VERSION, FromStore, Hello, Member, Message, Welcome, decoder
from common.net.access import Access
from common.net.link import Link
from common.net.zmq_transport import ZmqTransport
from kvbaton.errors import KvbatonError
from scripts.benchmarks.measure import on_cores, seconds_of
from tests.cluster.processes import Cluster, cpu_seconds

_ROLES = ("gateway", "prefill", "decode")
_JOIN_TIMEOUT_S = 30.0
_FOREVER_S = 100_000  # nobody beats here, and nobody shall be lost


class StoreMembers:
    """A gateway, a prefill and a decode worker, each with its own connection and, by role, its own
    transport.

    `pushed(message)` gets what the store tells decode without being asked; nobody, until it is set.
    """

    def __init__(
        self,
        transports: Mapping[str, ZmqTransport],
        endpoint: str,
        layout: KvLayout,
        *,
        mover: str,
    ) -> None:
        self.pushed: Callable[[Message], None] = _ignore
        self._transports = transports
        self._welcomes: dict[Link, asyncio.Future[Welcome]] = {}
        self.members = {role: _member(role, layout, mover) for role in _ROLES}
        self.links = {
            role: self._connect(endpoint, member, self._on_decode if role == "decode" else _ignore)
            for role, member in self.members.items()
        }

    @property
    def ids(self) -> dict[str, str]:
        """Member ids by role."""
        return {role: member.member_id for role, member in self.members.items()}

    async def welcome(self, link: Link) -> Welcome:
        """Wait until the store has welcomed us on this connection."""
        async with asyncio.timeout(_JOIN_TIMEOUT_S):
            return await self._welcomes[link]

    async def join(self) -> Welcome:
        """Wait until all have joined; returns a worker's welcome."""
        welcomes = [await self.welcome(link) for link in self.links.values()]
        return welcomes[-1]

    async def data_link(self, role: str) -> Link:
        """A worker's connection to the data socket, once it has joined."""
        welcome = await self.welcome(self.links[role])
        link = self._connect(welcome.data_endpoint, self.members[role], _ignore)
        await self.welcome(link)
        return link

    def close(self) -> None:
        for link in self._welcomes:
            link.close()

    def _on_decode(self, message: Message) -> None:
        self.pushed(message)

    def _connect(self, endpoint: str, member: Member, handle: Callable[[Message], None]) -> Link:
        welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()

        def refused(error: KvbatonError) -> None:
            welcome.set_exception(error)

        link = Link(
            self._transports[member.role],
            endpoint,
            decoder(FromStore),
            role="kvstore",
            hello=lambda: Hello(internal_version=INTERNAL_VERSION, member=member),
            welcomed=welcome.set_result,
            handle=handle,
            refused=refused,
        )
        self._welcomes[link] = welcome
        return link


def _ignore(_message: Message) -> None:
    pass


def _member(role: str, layout: KvLayout, mover: str) -> Member:
    return Member(
        member_id=secrets.token_hex(16),
        role=role,
        name=f"{role}.1",
        host_id="bench",  # not the store's: our end is then not watched
        pid=os.getpid(),
        endpoint="tcp://127.0.0.1:1",
        fingerprint="bench",
        model="bench",
        max_model_len=1 << 20,
        max_num_seqs=1024,
        mover=mover,
        layout=layout,
    )


class Usage(NamedTuple):
    """How long something took, and which shares of their cores the store and we used meanwhile."""

    seconds: float
    store: float
    load: float


class LiveStore:
    """The process, its members, and the loop that they run on."""

    def __init__(self, runner: asyncio.Runner, pid: int, members: StoreMembers) -> None:
        self.run = runner.run
        self.members = members
        self._pid = pid

    def use(self, work: Coroutine[Any, Any, None]) -> Usage:
        """Do the work."""
        store, load = cpu_seconds([self._pid]), time.process_time()
        seconds = seconds_of(partial(self.run, work))
        store, load = cpu_seconds([self._pid]) - store, time.process_time() - load
        return Usage(seconds, store / seconds, load / seconds)


@contextmanager
def live_store(
    cores: Iterable[int] | None,
    layout: KvLayout,
    num_blocks: int,
    mover: str,
    *,
    secure: bool = False,
    io_threads: int = 1,
    nixl_devices: str = "",
) -> Iterator[LiveStore]:
    """A store process on these cores, or on those that we use, with room for so many blocks.
    With `secure` both ends encrypt, each with so many `io_threads`."""
    with (
        tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as name,
        Cluster(Path(name), secure=secure) as cluster,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        settings: dict[str, Any] = {"heartbeat_s": _FOREVER_S, "lost_after_s": _FOREVER_S}
        if nixl_devices:
            settings["nixl_devices"] = nixl_devices
        kv_bytes = num_blocks * layout.block_bytes
        with on_cores(cores):
            cluster.start("kvstore", kv_bytes=kv_bytes, io_threads=io_threads, **settings)
        transports: dict[str, ZmqTransport] = {}

        async def connect() -> StoreMembers:
            for role in _ROLES:
                keys = Access(role, str(cluster.keys), not secure, []).load()
                transports[role] = ZmqTransport(keys, io_threads)
            members = StoreMembers(transports, cluster.stores, layout, mover=mover)
            await members.join()
            return members

        members = runner.run(connect())
        try:
            yield LiveStore(runner, cluster.processes["kvstore.1"].pid, members)
        finally:
            members.close()
            for transport in transports.values():
                transport.close()
