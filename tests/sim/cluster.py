"""A whole cluster in one process, over simulated seams and the mock engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.engine.mock import MockEngine
from common.messages import FromStore, FromWorker, Message, ToStore, ToWorker, decoder
from common.service import Seams, Tasks
from common.worker.config import WorkerConfig
from common.worker.role import Role
from common.worker.runtime import WorkerRuntime
from kvbaton.errors import KvbatonError
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest
from services.gateway.dispatcher import Dispatcher
from services.gateway.stream import RequestStream
from services.kvstore.ledger import Ledger
from services.kvstore.service import KvStore, StoreConfig
from services.prefill.worker import PrefillRole
from tests.sim.network import Pipe, SimNetwork
from tests.sim.world import VirtualLoop, World

T = TypeVar("T")
M = TypeVar("M", bound=Message)

STORES = ("sim://store-0", "sim://store-1")
DATA = ("sim://data-0", "sim://data-1")
HEARTBEAT_S = 1.0
LIMIT_S = 1000.0  # of virtual time

_ANY_MESSAGE = decoder(ToStore | FromStore | ToWorker | FromWorker)


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run on virtual time. Raises TimeoutError where the live cluster would hang, and what a
    callback of the loop raised: nothing else would see that."""

    async def limited() -> T:
        async with asyncio.timeout(LIMIT_S):
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

    def on_delivery(pipe: Pipe, frames: list[memoryview]) -> None:
        message = _ANY_MESSAGE.decode(frames[0])
        if isinstance(message, kind):
            callback(pipe, message)

    network.listeners.append(on_delivery)


@dataclass
class Shape:
    """How many of each, and their settings."""

    num_prefill: int = 1
    num_decode: int = 1
    num_stores: int = 1
    num_gateways: int = 1
    num_blocks: int = 512
    mover: str = "auto"
    mode: str = "disaggregated"
    worker: dict[str, Any] = field(default_factory=dict)


class SimGateway:
    """A gateway without faces."""

    def __init__(self, name: str, seams: Seams, shape: Shape) -> None:
        self.seams = seams
        self.failures: list[BaseException] = []
        self._tasks = Tasks(self.failures.append)
        self.dispatcher = Dispatcher(
            seams,
            self._tasks,
            name=name,
            stores=list(STORES[: shape.num_stores]),
            mode=shape.mode,
            max_requests=1000,
        )

    async def close(self) -> None:
        await self._tasks.close()
        self.dispatcher.close()


class SimCluster:
    """Started by `async with`; leaves nothing behind and sees every failure at the end."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world = world
        self.shape = shape
        self.stores: list[KvStore] = []
        self.workers: list[WorkerRuntime] = []
        self.gateways: list[SimGateway] = []
        self._num_requests = 0
        self._num_defects = 0
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
        processes: list[SimGateway | WorkerRuntime | KvStore]
        processes = [*self.gateways, *self.workers, *self.stores]
        for process in processes:
            await process.close()
        if error == (None, None, None):
            assert [failure for gateway in self.gateways for failure in gateway.failures] == []
            assert not any(worker.failed.done() for worker in self.workers)
            assert not any(store.failed.done() for store in self.stores)
            assert self._num_defects == 0

    def _look_for_defects(self, _pipe: Pipe, frames: list[memoryview]) -> None:
        """A service that fails over a message says so to its sender and goes on."""
        self._num_defects += KvbatonError.code.encode() in bytes(frames[0])

    # ---- processes --------------------------------------------------------------------------

    async def _start_store(self, index: int) -> KvStore:
        config = StoreConfig(
            name=f"kvstore.{index}",
            bind=STORES[index],
            data_bind=DATA[index],
            kv_bytes=self.shape.num_blocks * MockEngine(0, 0).info.layout.block_bytes,
            arena_dir="sim",
            heartbeat_s=HEARTBEAT_S,
        )
        store = KvStore(config, self.world.seams())
        await store.start()
        return store

    async def restart_store(self, index: int = 0) -> None:
        """Another process takes the place of a store, with the same settings."""
        await self.stores[index].close()
        self.stores[index] = await self._start_store(index)

    async def add_worker(self, role_name: str) -> WorkerRuntime:
        roles: dict[str, type[PrefillRole | DecodeRole]] = {
            "prefill": PrefillRole,
            "decode": DecodeRole,
        }
        config = WorkerConfig(
            name=f"{role_name}.{len(self.workers)}",
            engine="mock",
            stores=",".join(STORES[: self.shape.num_stores]),
            bind="sim://*:*",
            mover=self.shape.mover,
            **self.shape.worker,
        )

        async def make_engine(config: WorkerConfig) -> MockEngine:
            return MockEngine(config.mock_step_ms / 1000, config.mock_token_ms / 1000)

        def make_role(runtime: WorkerRuntime) -> Role:
            return roles[role_name](runtime)

        worker = WorkerRuntime(config, role_name, self.world.seams(), make_engine, make_role)
        self.workers.append(worker)
        await worker.start()
        return worker

    def add_gateway(self, host_id: str = "host") -> SimGateway:
        """On another host nobody sees it end."""
        name = f"gateway.{len(self.gateways)}"
        self.gateways.append(SimGateway(name, self.world.seams(host_id), self.shape))
        return self.gateways[-1]

    async def kill(self, process: WorkerRuntime | SimGateway) -> None:
        """As SIGKILL: no goodbye, its sockets close, and its host sees it end."""
        if isinstance(process, SimGateway):
            self.gateways.remove(process)
        else:
            self.workers.remove(process)
        self.world.network.kill(process.seams.pid)
        await process.close()
        self.world.processes.end(process.seams.pid)

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
    ) -> RequestStream:
        """Send a request to `gateway`, or to each in turn."""
        if gateway is None:
            gateway = self.gateways[self._num_requests % len(self.gateways)]
        self._num_requests += 1
        return gateway.dispatcher.submit(
            GenerationRequest(
                request_id=f"request-{self._num_requests}",
                prompt=prompt,
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0),
                deadline_s=deadline_s,
            )
        )

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
