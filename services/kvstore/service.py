"""The KV store: owns the arena, keeps the ledger, brokers each handoff from prefill to decode.

The life of a handoff here:
1. A gateway asks to `open` one: once there is room for the whole prompt it is reserved, the
   prompt's cached blocks are pinned, and the answer tells how many of them there are.
2. Prefill asks to `fill` it and is granted blocks; it commits each that is full, and a decode
   worker that cannot map the arena is told at once which blocks it may pull.
3. Prefill seals: decode is told, claims, and grows into blocks it has leased in advance.
4. Decode releases: what is committed stays as cache until the room is needed.
An abort, from any side and at any step, is told to all who are involved; who may be writing
confirms with `quit` when it surely is not. A member that is lost loses its handoffs, and its blocks
come back when its process is known to have ended. A store that was killed is followed by one that
finds its blocks (memory.py).

This file is the shell: sockets, membership, time. Handoffs are broker.py, rows are ledger.py.
"""

from __future__ import annotations

import asyncio

import structlog

from common.kv.arena import ArenaError
from common.kv.layout import KvLayout
from common.messages import (
    Heartbeat,
    Hello,
    Leave,
    Member,
    Message,
    Ok,
    Stopped,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.metrics_port import MetricsPort
from common.net.addresses import advertised
from common.net.nixl import Agent
from common.net.server import Server
from common.service import Seams, Tasks
from kvbaton.errors import ProtocolError, UnavailableError
from services.kvstore.admin import Admin, Question
from services.kvstore.broker import Broker
from services.kvstore.config import StoreConfig
from services.kvstore.data import DataServer
from services.kvstore.disk.secret import load_or_make_secret
from services.kvstore.journal import Worker, model_digest
from services.kvstore.members import Members
from services.kvstore.memory import StoreMemory
from services.kvstore.news import News
from services.kvstore.serving import Serving, disk_folder
from services.kvstore.worker_hello import check_worker, is_served
from services.kvstore.writers import Writers, is_same_process

log = structlog.get_logger()

_LEAST_SLEEP_S = 1e-3


class KvStore:
    """One store process. `failed` is set when it cannot go on."""

    def __init__(self, config: StoreConfig, seams: Seams) -> None:
        self.config = config
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.serving: Serving | None = None  # until the first worker tells the layout
        self._seams = seams
        self._tasks = Tasks(self._fail)
        self._instance_id = seams.rng.new_id()
        self._cache_secret = bytes.fromhex(seams.rng.new_id())
        self._memory = StoreMemory(config, seams, self._instance_id)
        self._members = Members(config.lost_after_s)
        self._writers = Writers(seams.processes, seams.host_id)
        self._admin = Admin(
            seams.clock,
            self._tasks,
            self._members,
            self._writers,
            name=config.name,
            send=self._send,
            broker=lambda: self.broker,
        )
        self._peers: dict[str, bytes] = {}  # member id -> routing id
        self._server: Server | None = None
        self._data: DataServer | None = None
        self.news = News(
            config.name,
            self._members,
            serving=lambda: self.serving,
            counted=self._counted,
            send=self._send,
        )
        self._metrics = MetricsPort(self.news.metrics)

    # ---- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Have an arena and bind. Raises ArenaError or TransportError."""
        config = self.config
        self._seams.notifier.describe = self.news.describe
        self._seams.notifier.status("reserving the arena")
        self._memory.open()
        if self._memory.left_secret is not None:
            self._cache_secret = self._memory.left_secret
        if config.disk_dir:
            self._cache_secret = await load_or_make_secret(
                self._seams.files, disk_folder(config), lambda: self._cache_secret
            )
        welcome = Welcome(instance_id=self._instance_id)
        self._data = DataServer(
            self._seams,
            self._tasks,
            config.data_bind,
            self._members,
            welcome,
            agent=await self._make_agent(),
        )
        self._data_endpoint = advertised(self._data.endpoint, config.advertise)
        self._server = Server(
            self._seams.transport,
            config.bind,
            decoder(ToStore),
            rights=RIGHTS["kvstore"],
            accept=self._accept,
            handle=lambda peer, message, _bulk: self._handle(peer, message),
            gone=self._peer_gone,
        )
        await self._metrics.open(config.metrics_host, config.metrics_port)
        if self._seams.notifier.beat_every_s:
            self._tasks.spawn(self._seams.notifier.beat_on(), "beat")
        self._tasks.spawn(self._tick(), "tick")
        self._tasks.spawn(self._expire(), "expire")
        log.info("store_ready", endpoint=self._server.endpoint, arena=self._memory.path)

    async def _make_agent(self) -> Agent | None:
        """To move blocks by NIXL, if settings say so. Raises StartError."""
        seams, devices = self._seams, self.config.nixl_devices
        if not devices:
            return None
        agent: Agent = await seams.aside(seams.nixl, self._instance_id, devices)
        return agent

    @property
    def endpoint(self) -> str:
        """Where the control socket is bound."""
        assert self._server is not None
        return self._server.endpoint

    @property
    def broker(self) -> Broker | None:
        """Who carries out what members say of handoffs; None before the first worker has joined."""
        return None if self.serving is None else self.serving.broker

    @property
    def num_corrupt(self) -> int:
        """Blocks that were dropped, wherever their bytes did not fit their digest."""
        assert self._data is not None
        return self._data.num_corrupt + (self.serving.num_corrupt if self.serving else 0)

    async def drain(self) -> None:
        """Nothing to wait for: without the store the cluster does no work."""

    async def close(self) -> None:
        self._metrics.close()
        await self._tasks.close()
        self._writers.close()
        for server in (self._server, self._data):
            if server is not None:
                server.close()
        self._memory.close()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    # ---- membership ---------------------------------------------------------------------------

    def _accept(self, peer: bytes, hello: Hello) -> Welcome:
        member = hello.member
        if member.role == "gateway":
            secret, num_blocks = self._cache_secret, 0
        else:
            secret, num_blocks = b"", self._check_model(member)
        assert self._server is not None
        known_peer = self._peers.get(member.member_id)
        if known_peer not in (None, peer):
            raise ProtocolError("another connection already speaks for this member")
        if self._writers.get_lost(member.member_id) is not None:
            # Each welcome is followed by another id: as this one it was never told of any block.
            self._check_same_process(member.member_id, member)
            self._lose(member.member_id, "it says hello again", stopped=True)
        if self._writers.may_write(member) and self.serving is not None:
            self.serving.add_worker(Worker(member, self._writers.started_at(member)))
        former = self._server.peers.get(peer)
        if former is not None and former.member_id != member.member_id:
            self._lose(former.member_id, "it said hello again", stopped=False)
        self._members.join(member, self._seams.clock.now())
        self._admin.joined(member)
        self._peers[member.member_id] = peer
        self._watch(member)
        log.info("member_joined", name=member.name, role=member.role, member=member.member_id)
        if member.role == "gateway":
            # After the welcome.
            asyncio.get_running_loop().call_soon(self.news.tell_again)
        return Welcome(
            instance_id=self._instance_id,
            heartbeat_s=self.config.heartbeat_s,
            arena_path=self._memory.path,
            data_endpoint=self._data_endpoint,
            cache_secret=secret,
            host_id=self._seams.host_id,
            num_blocks=num_blocks,
        )

    def _check_model(self, worker: Member) -> int:
        """Number of blocks for this worker. Raises KvbatonError to refuse it."""
        layout = check_worker(
            worker,
            self.serving,
            num_workers=self._members.num_workers(),
            kv_bytes=self.config.kv_bytes,
        )
        serving = self.serving
        if serving is None or not is_served(worker, serving):
            serving = self._serve(worker, layout)
        return serving.num_blocks

    def _serve(self, worker: Member, layout: KvLayout) -> Serving:
        if self.serving is not None:
            self.serving.end()
        assert self._data is not None
        num_blocks = self.config.kv_bytes // layout.block_bytes
        model = model_digest(layout, worker.fingerprint)
        try:
            journal, left = self._memory.serve(model, num_blocks, self._cache_secret)
        except ArenaError as error:
            self._fail(error)
            raise UnavailableError("the KV store has no arena", retry_after_s=1) from error
        self.serving = Serving(
            worker,
            config=self.config,
            seams=self._seams,
            tasks=self._tasks,
            arena=self._memory.arena,
            members=self._members,
            writers=self._writers,
            send=self._send,
            is_damaged=self._data.is_damaged,
            journal=journal,
            left=left,
        )
        self._data.serve(self.serving.ledger, self._memory.arena, layout)
        log.info("model_set", model=worker.model, num_blocks=self.serving.num_blocks)
        for former in left.workers if left is not None else []:
            self._await(former)
        return self.serving

    def _await(self, former: Worker) -> None:
        """A worker of the dead store may still be at work in the arena."""
        member = former.member
        self._admin.joined(member)
        self._writers.lost(member)
        self._watch(member)
        if self._writers.has_ended(member, former.started_at):
            self._lose(member.member_id, "its process ended", stopped=True)

    def _watch(self, member: Member) -> None:
        member_id = member.member_id
        self._writers.watch(
            member, lambda: self._lose(member_id, "its process ended", stopped=True)
        )

    def _lose(self, member_id: str, reason: str, *, stopped: bool) -> None:
        """A member is lost, or has stopped: then nothing of it needs quarantine any more."""
        member = self._members.remove(member_id)
        serving = self.serving
        if member is not None:
            log.info("member_lost", name=member.name, member=member_id, reason=reason)
            peer = self._peers.pop(member_id)
            is_awaited = serving is not None and serving.lose(member, reason)
            stopped |= not is_awaited or self._writers.cannot_harm(member)
            if self._server is not None and self._is_current(peer, member_id):
                self._server.forget(peer)
            if not stopped:
                self._writers.lost(member)
        if stopped:
            self._writers.stopped(member_id)
            if serving is not None:
                serving.stopped(member_id)
        if serving is not None:
            serving.broker.admit()
        self.news.tell()

    def _is_current(self, peer: bytes, member_id: str) -> bool:
        assert self._server is not None
        member = self._server.peers.get(peer)
        return member is not None and member.member_id == member_id

    def _peer_gone(self, _peer: bytes, member: Member) -> None:
        self._lose(member.member_id, "it cannot be reached", stopped=False)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.heartbeat_s)
            self.news.tell()

    async def _expire(self) -> None:
        """Lose those who were silent for too long, at once when it is too long."""
        while True:
            now = self._seams.clock.now()
            for member_id in self._members.expire(now):
                self._lose(member_id, "it was silent", stopped=False)
            await asyncio.sleep(max(_LEAST_SLEEP_S, self._members.next_expiry(now) - now))

    def _counted(self) -> dict[str, float]:
        assert self._server is not None
        assert self._data is not None
        return {
            "blocks_corrupt_total": self.num_corrupt,
            "bytes_in_total": self._data.num_bytes_in,
            "bytes_out_total": self._data.num_bytes_out,
            "messages_refused_total": self._server.refusals.num + self._data.num_refused,
        }

    # ---- messages -------------------------------------------------------------------------------

    def _stopped(self, sender: Member, former_id: str) -> None:
        """A process tells that what it was before writes no more. Others cannot say it for it."""
        if former_id == sender.member_id:
            raise ProtocolError("stopped can be said of one's own former incarnations only")
        if self._check_same_process(former_id, sender):
            self._lose(former_id, "it stopped", stopped=True)

    def _check_same_process(self, former_id: str, sender: Member) -> bool:
        """Whether there was such a member. Raises ProtocolError if it was another process."""
        former = self._members.get(former_id) or self._writers.get_lost(former_id)
        if former is not None and not is_same_process(former, sender):
            raise ProtocolError("stopped can be said of one's own former incarnations only")
        return former is not None

    def _send(self, member_id: str, message: Message) -> None:
        peer = self._peers.get(member_id)
        if peer is not None and self._server is not None:
            self._server.send(peer, message)

    def _handle(self, peer: bytes, message: Message) -> Message | None:
        assert self._server is not None
        member = self._server.peers[peer]
        if isinstance(message, Heartbeat):
            now = self._seams.clock.now()
            load, counts = message.load, message.counts
            if self._members.heard(member.member_id, load, message.ready, now, counts):
                log.info("member_ready", name=member.name, member=member.member_id)
                self.news.tell()
            return Ok()
        if isinstance(message, Leave):
            self._lose(member.member_id, "it left", stopped=True)
            return None
        if isinstance(message, Stopped):
            self._stopped(member, message.member_id)
            return Ok()
        if isinstance(message, Question):
            return self._admin.handle(member, message)
        if self.serving is None:
            raise UnavailableError("no worker has joined yet", retry_after_s=1)
        return self.serving.handle(member, message)
