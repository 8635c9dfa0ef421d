"""A whole cluster in one process, over simulated seams and the mock engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.engine.mock import MockEngine
from common.engine.work import Engine
from common.messages import Message
from common.service import DRAIN_TIMEOUT_S, Seams
from common.worker.config import WorkerConfig
from common.worker.role import Role
from common.worker.runtime import WorkerRuntime
from kvbaton.errors import KvbatonError
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest
from services.gateway.routing.chooser import Routing
from services.gateway.routing.stream import RequestStream
from services.kvstore.config import StoreConfig
from services.kvstore.ledger import Ledger
from services.kvstore.service import KvStore
from services.prefill.worker import PrefillRole
from tests.sim.gateway import SimGateway
from tests.sim.loop import VirtualLoop, virtual_loop
from tests.sim.network import Pipe, SimNetwork, decoded, type_of
from tests.sim.world import World

T = TypeVar("T")
M = TypeVar("M", bound=Message)

STORES = ("sim://store-0", "sim://store-1")
DATA = ("sim://data-0", "sim://data-1")
HEARTBEAT_S = 1.0
LIMIT_S = 1000.0  # of virtual time


def simulate(main: Coroutine[Any, Any, T], limit_s: float = LIMIT_S) -> T:
    """Run on virtual time. Raises TimeoutError where the live cluster would hang, and what a
    callback of the loop raised: nothing else would see that."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    errors: list[Exception] = []

    def on_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        errors.append(context.get("exception") or RuntimeError(context["message"]))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(on_error)
        try:
            return runner.run(limited())
        finally:
            if errors:
                raise ExceptionGroup("the loop's callbacks failed", errors)


def listen(network: SimNetwork, kind: type[M], callback: Callable[[Pipe, M], None]) -> None:
    """Call back with each message of a kind, just before it is delivered."""
    tag = kind.__struct_config__.tag

    def on_delivery(pipe: Pipe, frames: list[memoryview]) -> None:
        if type_of(frames) == tag:
            callback(pipe, decoded(frames, kind))

    network.listeners.append(on_delivery)


def mock_engine(config: WorkerConfig) -> Engine:
    return MockEngine(config.mock_step_ms / 1000, config.mock_token_ms / 1000)


@dataclass
class Shape:
    """How many of each, and their settings; `num_blocks` counts blocks of the mock engine."""

    num_prefill: int = 1
    num_decode: int = 1
    num_stores: int = 1
    num_gateways: int = 1
    num_blocks: int = 512
    mover: str = "auto"
    movers: tuple[str, ...] = ()  # of the workers, in turn, where they differ
    hosts: tuple[str, ...] = ("host",)  # where the workers are, in turn
    lost_after_s: float = 8.0
    disk_bytes: int = 0  # 0: no disk tier
    mode: str = "disaggregated"
    nixl_devices: str = ""  # of the stores
    routing: dict[str, Any] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    engine: Callable[[WorkerConfig], Engine] = mock_engine


Process = SimGateway | WorkerRuntime | KvStore


class SimCluster:
    """Started by `async with`; leaves nothing behind and sees every failure at the end."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world = world
        self.shape = shape
        self.stores: list[KvStore] = []
        self.workers: list[WorkerRuntime] = []
        self.gateways: list[SimGateway] = []
        self._pids: dict[Process, int] = {}
        self._num_started = 0
        self._num_requests = 0
        self._drains: dict[int, asyncio.Task[None]] = {}  # by process number
        self._failures: list[BaseException] = []  # of processes that are gone
        self.num_defects = 0
        world.network.listeners.append(self._look_for_defects)

    async def __aenter__(self) -> SimCluster:
        for index in range(self.shape.num_stores):
            self.stores.append(await self._start_store(index))
        for _ in range(self.shape.num_prefill):
            await self.add_worker("prefill")
        for _ in range(self.shape.num_decode):
            await self.add_worker("decode")
        for _ in range(self.shape.num_gateways):
            self.add_gateway()
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert all(gateway.dispatcher.ready for gateway in self.gateways)
        return self

    async def __aexit__(self, *error: object) -> None:
        processes: list[Process] = [*self.gateways, *self.workers, *self.stores]
        for process in processes:
            await process.close()
        if error == (None, None, None):
            assert self.failures() == [], self.failures()
            assert self.num_defects == 0

    def failures(self) -> list[BaseException]:
        """Why processes could not go on."""
        processes: list[Process] = [*self.gateways, *self.workers, *self.stores]
        return self._failures + [why for each in processes for why in _failures_of(each)]

    def _look_for_defects(self, _pipe: Pipe, frames: list[memoryview]) -> None:
        """A service that fails over a message says so to its sender and goes on."""
        if type_of(frames) in ("failed", "dropped"):
            self.num_defects += KvbatonError.code.encode() in bytes(frames[0])

    # ---- processes --------------------------------------------------------------------------

    def pid(self, process: Process) -> int:
        return self._pids[process]

    def name(self, process: Process) -> str:
        """Another for each process that is started."""
        return self.world.network.names[self._pids[process]]

    def is_alive(self, process: Process) -> bool:
        return process in self._pids

    def of_pid(self, pid: int) -> Process | None:
        """The process, if it is alive."""
        return next((each for each, number in self._pids.items() if number == pid), None)

    def pid_at(self, endpoint: str) -> int:
        """Who has bound an endpoint; 0 for nobody."""
        router = self.world.network.routers.get(endpoint)
        return 0 if router is None else router.pid

    def at(self, endpoint: str) -> Process | None:
        """The process that has bound an endpoint."""
        return self.of_pid(self.pid_at(endpoint))

    async def _within(self, seams: Seams, work: Coroutine[Any, Any, T]) -> T:
        """Run as this process's work."""
        context = self.world.context(seams.pid)
        return await asyncio.get_running_loop().create_task(work, context=context)

    def _seams(self, role: str, host_id: str = "host") -> Seams:
        self._num_started += 1
        return self.world.seams(host_id, f"{role}.{self._num_started}")

    async def _start_store(self, index: int) -> KvStore:
        config = StoreConfig(
            name=f"kvstore.{index}",
            bind=STORES[index],
            data_bind=DATA[index],
            kv_bytes=self.shape.num_blocks * MockEngine(0, 0).info.layout.block_bytes,
            arena_dir="sim",
            heartbeat_s=HEARTBEAT_S,
            lost_after_s=self.shape.lost_after_s,
            disk_dir="disk" if self.shape.disk_bytes else "",
            disk_bytes=self.shape.disk_bytes or 1,
            nixl_devices=self.shape.nixl_devices,
        )
        seams = self._seams("kvstore")
        store = KvStore(config, seams)
        self._pids[store] = seams.pid
        await self._within(seams, store.start())
        return store

    async def restart_store(self, index: int = 0) -> None:
        """Another process takes the place of a store, with the same settings."""
        store = self.stores[index]
        await store.close()
        self.world.end(self._pids.pop(store))
        await self.start_store(index)

    async def crash_store(self, index: int, down_s: float) -> None:
        """As SIGKILL; after a while another takes its place."""
        await self.kill(self.stores[index])
        await asyncio.sleep(down_s)
        await self.start_store(index)

    async def start_store(self, index: int) -> None:
        """A store takes the place of one that is gone."""
        self.stores[index] = await self._start_store(index)

    async def add_worker(self, role_name: str) -> WorkerRuntime:
        roles: dict[str, type[PrefillRole | DecodeRole]] = {
            "prefill": PrefillRole,
            "decode": DecodeRole,
        }
        shape, index = self.shape, len(self._pids)
        movers = shape.movers or (shape.mover,)
        seams = self._seams(role_name, shape.hosts[index % len(shape.hosts)])
        config = WorkerConfig(
            name=self.world.network.names[seams.pid],
            engine="mock",
            stores=",".join(STORES[: shape.num_stores]),
            bind="sim://*:*",
            mover=movers[index % len(movers)],
            **shape.worker,
        )

        async def make_engine(config: WorkerConfig) -> Engine:
            return shape.engine(config)

        def make_role(runtime: WorkerRuntime) -> Role:
            return roles[role_name](runtime)

        worker = WorkerRuntime(config, role_name, seams, make_engine, make_role)
        self._pids[worker] = seams.pid
        try:
            await self._within(seams, worker.start())
        finally:
            self.workers.append(worker)
        return worker

    def add_gateway(self, host_id: str = "host") -> SimGateway:
        """On another host nobody sees it end."""
        seams = self._seams("gateway", host_id)
        name = self.world.network.names[seams.pid]
        routing = Routing(mode=self.shape.mode, **self.shape.routing)
        gateway = self.world.context(seams.pid).run(
            SimGateway, name, seams, list(STORES[: self.shape.num_stores]), routing
        )
        self._pids[gateway] = seams.pid
        self.gateways.append(gateway)
        return gateway

    async def kill(self, process: Process) -> None:
        """As SIGKILL: no goodbye, its sockets close, and its host sees it end."""
        pid = self._forget(process)
        self.world.network.kill(pid)
        self.world.disk.end(pid)
        loop = virtual_loop()
        if loop.is_stopped(pid):
            loop.continue_process(pid)  # to be cancelled before it can do anything
        if (drain := self._drains.get(pid)) is not None:
            drain.cancel()
        await process.close()
        self.world.end(pid)

    async def drain(self, process: Process) -> bool:
        """As SIGTERM; returns when it has ended. False if it was killed meanwhile."""
        pid = self._pids[process]

        async def leave() -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.drain(), DRAIN_TIMEOUT_S)

        context = self.world.context(pid)
        self._drains[pid] = asyncio.get_running_loop().create_task(leave(), context=context)
        await asyncio.wait([self._drains[pid]])
        if self._drains.pop(pid).cancelled() or not self.is_alive(process):
            return False
        self._forget(process)
        await asyncio.get_running_loop().create_task(process.close(), context=context)
        self.world.network.kill(pid)
        self.world.disk.end(pid)
        self.world.end(pid)
        return True

    def _forget(self, process: Process) -> int:
        """It serves no more. Its stores stay where they are until others take their places."""
        self._failures += _failures_of(process)
        if isinstance(process, SimGateway):
            self.gateways.remove(process)
        elif isinstance(process, WorkerRuntime):
            self.workers.remove(process)
        return self._pids.pop(process)

    def of_role(self, role: type[PrefillRole | DecodeRole]) -> list[WorkerRuntime]:
        return [worker for worker in self.workers if isinstance(worker.role, role)]

    # ---- requests ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        num_tokens: int,
        *,
        deadline_s: float | None = None,
        gateway: SimGateway | None = None,
        tenant: str = "",
        cache_salt: str = "",
    ) -> RequestStream:
        """Send a request to `gateway`, or to each in turn."""
        if gateway is None:
            gateway = self.gateways[self._num_requests % len(self.gateways)]
        self._num_requests += 1
        return self.give(
            gateway,
            GenerationRequest(
                request_id=f"request-{self._num_requests}",
                prompt=prompt,
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0),
                deadline_s=deadline_s,
                tenant=tenant,
                cache_salt=cache_salt,
            ),
        )

    def give(self, gateway: SimGateway, request: GenerationRequest) -> RequestStream:
        """Send a request to a gateway. Raises KvbatonError if it is refused."""
        context = self.world.context(gateway.seams.pid)
        stream = context.run(gateway.dispatcher.submit, request)
        gateway.streams.append(stream)
        return stream

    def ledgers(self) -> list[Ledger]:
        return [store.broker.ledger for store in self.stores if store.broker is not None]

    async def settle(self) -> None:
        """Let everything that is under way end; then all blocks must be free or cache."""
        await asyncio.sleep(10 * HEARTBEAT_S)
        for ledger in self.ledgers():
            ledger.check()
            assert ledger.handoffs == {}
            assert ledger.num_reserved == 0
            counts = ledger.pool.counts()
            assert counts["free"] + counts["cached"] == ledger.pool.num_blocks, counts
        assert all(worker.role.sequences() == [] for worker in self.workers)


def _failures_of(process: Process) -> list[BaseException]:
    if isinstance(process, SimGateway):
        return process.failures
    return [process.failed.result()] if process.failed.done() else []


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; raises TimeoutError if it does not come."""
    for _ in range(int(LIMIT_S / 1e-3)):
        if condition():
            return
        await asyncio.sleep(1e-3)
    raise TimeoutError


async def output_of(stream: RequestStream) -> list[int]:
    """All tokens of a request."""
    tokens: list[int] = []
    async for event in stream:
        assert event.index == len(tokens)
        tokens.append(event.token_id)
        if event.finish_reason is not None:
            break
    return tokens
