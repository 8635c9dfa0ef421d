"""A whole cluster in one process, over simulated seams and the mock engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.engine.mock import MockEngine
from common.service import Tasks
from common.worker.config import WorkerConfig
from common.worker.role import Role
from common.worker.runtime import WorkerRuntime
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest
from services.gateway.dispatcher import Dispatcher
from services.gateway.stream import RequestStream
from services.kvstore.ledger import Ledger
from services.kvstore.service import KvStore, StoreConfig
from services.prefill.worker import PrefillRole
from tests.sim.world import VirtualLoop, World

T = TypeVar("T")

STORES = ("sim://store-0", "sim://store-1")
HEARTBEAT_S = 1.0


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run on virtual time. Raises NothingLeftError where the live cluster would hang."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@dataclass
class Shape:
    """How many of each, and their settings."""

    num_prefill: int = 1
    num_decode: int = 1
    num_stores: int = 1
    num_blocks: int = 512
    mover: str = "auto"
    mode: str = "disaggregated"
    worker: dict[str, Any] = field(default_factory=dict)


class SimCluster:
    """Started by `async with`; leaves nothing behind and checks every ledger at the end."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world = world
        self.shape = shape
        self.stores: list[KvStore] = []
        self.workers: list[WorkerRuntime] = []
        self.failures: list[BaseException] = []
        self._tasks = Tasks(self.failures.append)
        self._num_requests = 0

    async def __aenter__(self) -> SimCluster:
        block_bytes = MockEngine(0, 0).info.layout.block_bytes
        for index in range(self.shape.num_stores):
            config = StoreConfig(
                name=f"kvstore.{index}",
                bind=STORES[index],
                data_bind="sim://*:*",
                kv_bytes=self.shape.num_blocks * block_bytes,
                arena_dir="sim",
                heartbeat_s=HEARTBEAT_S,
            )
            store = KvStore(config, self.world.seams())
            await store.start()
            self.stores.append(store)
        for _ in range(self.shape.num_prefill):
            await self.add_worker("prefill")
        for _ in range(self.shape.num_decode):
            await self.add_worker("decode")
        self.gateway = Dispatcher(
            self.world.seams(),
            self._tasks,
            name="gateway.1",
            stores=list(STORES[: self.shape.num_stores]),
            mode=self.shape.mode,
            max_requests=1000,
        )
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert self.gateway.ready
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._tasks.close()
        self.gateway.close()
        for worker in self.workers:
            await worker.close()
        for store in self.stores:
            await store.close()
        if error == (None, None, None):
            assert self.failures == []
            assert not any(worker.failed.done() for worker in self.workers)
            assert not any(store.failed.done() for store in self.stores)

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

    async def kill(self, worker: WorkerRuntime) -> None:
        """As SIGKILL: no goodbye, and the host sees the process end."""
        self.workers.remove(worker)
        await worker.close()
        self.world.processes.end(worker.seams.pid)

    def of_role(self, role: type[PrefillRole | DecodeRole]) -> list[WorkerRuntime]:
        return [worker for worker in self.workers if isinstance(worker.role, role)]

    def submit(
        self, prompt: list[int], num_tokens: int, deadline_s: float | None = None
    ) -> RequestStream:
        self._num_requests += 1
        return self.gateway.submit(
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


async def output_of(stream: RequestStream) -> list[int]:
    """All tokens of a request."""
    tokens: list[int] = []
    async for event in stream:
        assert event.index == len(tokens)
        tokens.append(event.token_id)
        if event.finish_reason is not None:
            break
    return tokens
