"""The shell around a worker's scheduler: what a prefill and a decode worker have in common.

A service (services/prefill, services/decode) gives its decisions as a `Role`. Here is its life and
what gateways say and hear; stores.py joins the stores, taking.py comes to a sequence's blocks,
steps.py runs the engine, outputs.py tells gateways of tokens, endings.py ends sequences.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from common.cluster_metrics import WorkerRow, worker_families
from common.config import StartError
from common.engine.work import Engine, Sampled, Work
from common.log import change_log_level
from common.messages import (
    Drain,
    Heartbeat,
    Hello,
    Member,
    Message,
    Ok,
    Prefill,
    ReportHoldings,
    Reserve,
    SetLogLevel,
    StaleError,
    ToWorker,
    Welcome,
    WorkerCounts,
    decoder,
)
from common.messages.rights import RIGHTS
from common.metrics import exposition, render
from common.metrics_port import MetricsPort
from common.net.addresses import advertised, check_told
from common.net.server import Server
from common.service import Seams, Tasks, first_of
from common.step_times import FIRST_SHARE
from common.worker.config import WorkerConfig
from common.worker.endings import Endings
from common.worker.holdings import holdings
from common.worker.mover import MESSAGE_BYTES
from common.worker.moving import Moving
from common.worker.nixl_wire import make_memory
from common.worker.outputs import Outputs
from common.worker.publisher import Publisher
from common.worker.role import Role
from common.worker.sequence import Sequence
from common.worker.step_fit import StepFits
from common.worker.steps import StepLoop
from common.worker.store_link import StoreLink
from common.worker.stores import Stores
from common.worker.taking import Taking
from kvbaton.errors import ProtocolError, UnavailableError, UnprocessableError
from kvbaton.traceparent import trace_id
from kvbaton.version import VERSION

log = structlog.get_logger()

_LEAVE_S = 1.0  # of the time that a drain may take: for the last step, and to leave the stores


class WorkerRuntime:
    """One worker process. `failed` is set when it cannot go on. `endpoint` is where gateways reach
    it, from its start on."""

    def __init__(
        self,
        config: WorkerConfig,
        role_name: str,
        seams: Seams,
        make_engine: Callable[[WorkerConfig], Awaitable[Engine]],
        make_role: Callable[[WorkerRuntime], Role],
    ) -> None:
        self.config = config
        self.seams = seams
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.tasks = Tasks(self._fail)
        self.is_draining = False
        self._instance_id = seams.rng.new_id()
        self._role_name = role_name
        self._make_engine = make_engine
        self._make_role = make_role
        self._counts = WorkerCounts()
        self._moving = Moving(self._counts, config.data_connections, config.kv_compression)
        self._engine: Engine | None = None
        self._server: Server | None = None
        self._steps: StepLoop | None = None
        self._stores: Stores | None = None
        self._metrics = MetricsPort(self.metrics)

    # ---- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model, bind, join every store; returns once steps can run."""
        if self.config.batch_invariant and self.config.kv_compression == "int8":
            raise StartError(
                "--kv-compression int8 changes what is computed, which --batch-invariant rules out"
            )
        notifier = self.seams.notifier
        notifier.describe = self._describe_load
        notifier.status(f"loading {self.config.model}")
        engine = self._engine = await self._make_engine(self.config)
        self.info = engine.info
        self.block_size = self.info.layout.block_size
        self.full_step_tokens = engine.full_step_tokens
        self.step_fits = StepFits(self.config.max_num_batched_tokens, self.full_step_tokens)
        self.role = self._make_role(self)
        self.endings = Endings(self.role, self.answer, self.store_of)
        self.taking = Taking(engine, self.endings, self.store_of)
        self.outputs = Outputs(self.answer, self.seams.clock, self.info.layout.block_bytes)
        if self.config.mover == "nixl":
            self._moving.memory = await make_memory(
                self.config, self.seams, self.info.layout.block_bytes
            )
        part_blocks = max(1, MESSAGE_BYTES // self.info.layout.block_bytes)
        self.publisher = Publisher(self.tasks, self.endings, part_blocks)
        steps = self._steps = StepLoop(
            engine,
            self,
            self.endings,
            self.seams.clock,
            notifier,
            fits=self.step_fits,
            counts=self._counts,
        )
        self._server = Server(
            self.seams.transport,
            self.config.bind,
            decoder(ToWorker),
            rights=RIGHTS[self._role_name],
            accept=self._accept,
            handle=lambda peer, message, _bulk: self._on_gateway(peer, message),
            gone=lambda peer, _member: self._gateway_gone(peer),
        )
        self.endpoint = check_told(advertised(self._server.endpoint, self.config.advertise))
        stores = self._stores = Stores(
            self.seams,
            self.tasks,
            engine,
            steps.engine_free,
            self.config.mover,
            lost=self._store_lost,
            failed=self._fail,
        )
        stores.join(
            self.config.stores.split(","),
            describe=self._describe,
            load=self.role.load,
            counts=self.counts,
            moving=self._moving,
            handle=self._on_store,
        )
        notifier.status(f"waiting for {self.config.stores}")
        await first_of(self.tasks.spawn(stores.attached.wait(), "attach"), self.failed)
        if self.failed.done():
            raise self.failed.result()
        await self._metrics.open(self.config.metrics_host, self.config.metrics_port)
        self.tasks.spawn(steps.run(), "step-loop")
        log.info("worker_ready", endpoint=self.endpoint, model=self.config.model)

    async def drain(self) -> None:
        """Leave the cluster: finish or hand on what runs here, give up what takes too long."""
        assert self._steps is not None
        assert self._stores is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.config.drain_s - _LEAVE_S)):
                await self._hand_on_all()
        for sequence in self.role.sequences():
            self.endings.drop(sequence, "unavailable", "the worker is shutting down")
        async with self._steps.engine_free:  # the running step has ended, none follows
            self._stores.leave()
        log.info("worker_drained", num_tokens_computed=self.num_tokens_computed)

    async def _hand_on_all(self) -> None:
        """Take nothing new from now on; returns when nothing is held any more."""
        self.is_draining = True
        for store in self.stores:
            store.tell()
        self.wake()
        while self.role.sequences():
            self.endings.removed.clear()
            await self.endings.removed.wait()

    async def close(self) -> None:
        self._metrics.close()
        await self.tasks.close()
        if self._stores is not None:
            self._stores.close()
        if self._server is not None:
            self._server.close()
        if self._engine is not None:
            self._engine.close()
        if self._moving.memory is not None:
            self._moving.memory.agent.close()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    # ---- stores -------------------------------------------------------------------------------

    def _describe(self, member_id: str) -> Member:
        return Member(
            member_id=member_id,
            role=self._role_name,
            name=self.config.name,
            host_id=self.seams.host_id,
            pid=self.seams.pid,
            endpoint=self.endpoint,
            fingerprint=self.info.fingerprint,
            model=self.config.model,
            version=VERSION,
            max_model_len=self.info.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            decodes=True,
            # By NIXL or not, it is memory of its own and checked on its way.
            mover="zmq" if self.config.mover == "nixl" else self.config.mover,
            layout=self.info.layout,
        )

    def _on_store(self, store: StoreLink, message: Message) -> None:
        if isinstance(message, ReportHoldings):
            # As a task of its own: who waits for an answer that has come takes it in first.
            self.tasks.spawn(self._report(store, message.audit_id), "report")
        else:
            self.role.on_store(store, message)

    async def _report(self, store: StoreLink, audit_id: int) -> None:
        store.link.send(holdings(store, self.role.sequences(), audit_id))

    def _store_lost(self, store: StoreLink) -> None:
        for sequence in self.role.sequences():
            if sequence.store == store.index:
                self.endings.drop(sequence, "unavailable", "the KV store restarted")

    @property
    def stores(self) -> list[StoreLink]:
        """The link to each store, in the order of the settings."""
        assert self._stores is not None
        return self._stores.links

    def store_of(self, sequence: Sequence) -> StoreLink:
        """The store that holds the sequence's blocks."""
        return self.stores[sequence.store]

    # ---- gateways -----------------------------------------------------------------------------

    def _accept(self, peer: bytes, hello: Hello) -> Welcome:
        self._gateway_gone(peer)  # it says hello again: what it had here is over
        expected = hello.member.fingerprint
        if expected and expected != self.info.fingerprint:
            raise ProtocolError(
                f"this worker serves model {self.info.fingerprint[:12]}, not {expected[:12]}"
            )
        return Welcome(instance_id=self._instance_id)

    def _on_gateway(self, peer: bytes, message: Message) -> Message | None:
        if isinstance(message, Heartbeat):
            return Ok()
        if isinstance(message, SetLogLevel):
            change_log_level(message.level)
            return Ok()
        if isinstance(message, Drain):
            if message.worker_id not in [store.member_id for store in self.stores]:
                raise StaleError("this worker was another member when it was to be drained")
            self.tasks.spawn(self._drain_for(peer, message.call_id), "drain")
            return None
        if self.is_draining:
            raise UnavailableError("the worker is shutting down", retry_after_s=1)
        return self.role.on_gateway(peer, message)

    async def _drain_for(self, peer: bytes, call_id: int) -> None:
        """An operator has said so at a gateway. The process stays until it is stopped."""
        log.info("draining", reason="an operator said so", num_held=len(self.role.sequences()))
        await self._hand_on_all()
        for store in self.stores:
            store.tell()
        log.info("worker_drained", num_tokens_computed=self.num_tokens_computed)
        self.answer(peer, Ok(call_id=call_id))

    def _gateway_gone(self, peer: bytes) -> None:
        """It cannot be sent to: give its requests up. Through the store it can place them again."""
        self.outputs.forget(peer)
        for sequence in self.role.sequences():
            if sequence.gateway == peer:
                self.endings.abort(sequence)

    def answer(self, peer: bytes, message: Message) -> None:
        """Answer a gateway's call later than at once."""
        assert self._server is not None
        self._server.send(peer, message)

    # ---- sequences ----------------------------------------------------------------------------

    def new_sequence(self, gateway: bytes, message: Prefill | Reserve) -> Sequence:
        """The sequence that a gateway asks for. Raises UnprocessableError for a wrong store."""
        if not 0 <= message.store < len(self.stores):
            raise UnprocessableError(
                f"store must be below {len(self.stores)}, got {message.store}", field="store"
            )
        if message.worker_id != self.stores[message.store].member_id:
            raise StaleError("the handoff is for a former incarnation of this worker")
        now = self.seams.clock.now()
        return Sequence(
            handoff_id=message.handoff_id,
            epoch=message.epoch,
            store=message.store,
            incarnation=self.stores[message.store].member_id,
            first_slot=self.stores[message.store].first_slot,
            gateway=gateway,
            root_key=message.root_key,
            tokens=message.tokens,
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            choice=message.choice,
            arrived_at=now,
            block_size=self.block_size,
            first_due_at=now + FIRST_SHARE * message.ttft_left_ms / 1000,
            names=_names(message),
        )

    def works(self, plan: list[tuple[Sequence, int]]) -> list[tuple[Sequence, Work]]:
        """A scheduler's plan as the engine wants it."""
        return [(sequence, sequence.work(num_tokens)) for sequence, num_tokens in plan]

    # ---- steps --------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """That were run since the start."""
        return self._counts.num_steps

    @property
    def pulled_bytes_per_s(self) -> float:
        """How fast blocks come from stores elsewhere, as far as is known; 0 before any has."""
        return self._moving.pulls.blocks.bytes_per_s(self.seams.clock.now())

    @property
    def pushed_bytes_per_s(self) -> float:
        """How fast they go there."""
        return self._moving.pushes.blocks.bytes_per_s(self.seams.clock.now())

    @property
    def tokens_per_s(self) -> float:
        """How fast the engine computes; 0 before its first step."""
        return self._steps.tokens_per_s if self._steps else 0.0

    @property
    def num_tokens_computed(self) -> int:
        """Positions that the engine has computed since its start."""
        return self._steps.num_tokens_computed if self._steps else 0

    def counts(self) -> WorkerCounts:
        """What this process has counted so far."""
        if self._server is not None:
            self._counts.num_messages_refused = self._server.refusals.num
        return self._counts

    def _describe_load(self) -> str:
        """For the status that the supervisor shows."""
        load = self.role.load()
        return (
            f"serving: {load.num_running} running, {load.num_waiting} waiting, "
            f"{load.tokens_per_s:.0f} tokens/s"
        )

    def metrics(self) -> bytes:
        """For its own /metrics."""
        row = WorkerRow(self.config.name, self._role_name, self.role.load(), self.counts())
        return exposition() + render(worker_families([row]))

    def preempted(self) -> None:
        """A sequence has given way to others."""
        self._counts.num_preemptions += 1

    def wake(self) -> None:
        """There may be something to do."""
        if self._steps is not None:
            self._steps.wake.set()

    def plan_step(self) -> list[tuple[Sequence, Work]]:
        if self.is_draining:
            self.role.hand_on()
        return self.role.plan()

    def advance(self, sequence: Sequence, work: Work, sampled: Sampled | None) -> None:
        sequence.computed(work)
        self.publisher.publish(self.store_of(sequence), sequence)
        if sampled is not None:
            sequence.tokens.append(sampled.token_id)
        self.role.apply(sequence, sampled)

    def step_ended(self) -> None:
        self.outputs.leave(self.role.load)


def _names(message: Prefill | Reserve) -> dict[str, str]:
    """What log lines about a request go by, here as at its gateway and its store."""
    names = {"handoff": message.handoff_id, "request": message.request_id}
    return names | ({"trace": trace_id(message.traceparent)} if message.traceparent else {})
