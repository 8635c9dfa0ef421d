"""One seed's run of the whole cluster: its shape, its load, its faults, and what must hold after.

Everything is drawn from the seed. `run_seed` returns the report, `Report.broken` what went wrong.
In safety mode faults may be as bad as they like, and requests may fail, with a typed error. In
liveness mode each fault is over soon, and after the last every admitted request must be answered in
full before long.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from dataclasses import dataclass, field

from common.engine.mock import MOCK_LAYOUT, mock_output
from kvbaton.errors import KvbatonError
from services.gateway.backend import Targets
from tests.sim.chaos import Chaos, Fault
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.faults import DISK_FAULTS, LINK_FAULTS, PROCESS_FAULTS
from tests.sim.gateway import SimGateway
from tests.sim.load import Clients
from tests.sim.loop import virtual_loop
from tests.sim.recovery import Recoveries
from tests.sim.trace import Trace
from tests.sim.world import World

MODES = ("safety", "liveness")
NUM_REQUESTS = 30  # at least
NUM_FAULTS = 2  # at least, that have struck; most of them bring a second one
DONE_WITHIN_S = 10.0  # after the last fault, in liveness mode
_LONGEST_S = {"safety": 5.0, "liveness": 1.5}  # a process is down, or a connection disturbed
_SOME = (1, 1, 2, 2, 3)
_DISK_SHARE = 0.4  # of the seeds have a disk tier
_TARGETS_SHARE = 0.25  # have targets, which pace prompts at decode
_PATIENCE_S = 90.0  # after the last fault everybody must be well again
_LIMIT_S = 2000.0


@dataclass
class Report:
    """What a seed's run came to."""

    seed: int
    mode: str
    shape: str
    num_requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    recoveries: Recoveries = field(default_factory=Recoveries)
    num_resumed: int = 0  # requests that went on at another gateway
    done_after_s: float = 0.0  # the last fault
    num_deliveries: int = 0
    num_loaded: int = 0  # blocks, from the disk, by the stores that lived to the end
    events: list[str] = field(default_factory=list)
    trace_hash: str = ""
    broken: list[str] = field(default_factory=list)

    def line(self) -> str:
        """All of it in one line."""
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.struck.items()))
        pairs = "; ".join(f"{one} then {two} ({aim})" for one, two, aim in sorted(self.pairs))
        verdict = f" BROKEN: {self.broken[0]}" if self.broken else ""
        return (
            f"{self.mode} seed {self.seed}: {self.num_requests} requests ({outcomes}; "
            f"{self.num_resumed} resumed); faults struck: {faults}; pairs: {pairs or 'none'}; "
            f"done after {self.done_after_s:.3f} s; trace {self.trace_hash}{verdict}"
        )


@dataclass(frozen=True)
class Plan:
    """What a seed asks for."""

    shape: Shape
    num_clients: int
    num_requests: int
    num_faults: int
    faults: dict[str, Fault]
    loses_on_close: bool


def draw(seed: int, mode: str) -> Plan:
    """Another cluster, load and faults for each seed of each mode."""
    rng = random.Random(f"{mode} {seed} plan")
    placing = rng.choice(["disaggregated", "disaggregated", "colocated"])
    shape = Shape(
        num_prefill=0 if placing == "colocated" else rng.choice(_SOME),
        num_decode=rng.choice(_SOME),
        num_stores=rng.choice([1, 1, 2]),
        num_gateways=rng.choice(_SOME),
        num_blocks=rng.choice([20, 32, 48, 256]),
        movers=tuple(rng.choice(["auto", "zmq"]) for _ in range(5)),
        hosts=tuple(rng.choice(["host", "host", "elsewhere"]) for _ in range(5)),
        lost_after_s=3.0,
        mode=placing,
        worker={
            "max_num_seqs": rng.choice([2, 4, 16]),
            "max_num_batched_tokens": rng.choice([32, 128]),
            "mock_step_ms": rng.choice([2.0, 8.0]),
            "mock_token_ms": rng.choice([0.05, 0.5]),
        },
    )
    faults = PROCESS_FAULTS | LINK_FAULTS
    if placing == "colocated":
        faults = {kind: fault for kind, fault in faults.items() if not kind.endswith("_prefill")}
    if rng.random() < _DISK_SHARE:
        # So little memory that blocks are evicted, and come back.
        shape.num_blocks = rng.choice([20, 32, 48])
        shape.disk_bytes = rng.choice([100, 400]) * MOCK_LAYOUT.block_bytes
        faults |= DISK_FAULTS
    pacing = random.Random(f"{mode} {seed} targets")
    if pacing.random() < _TARGETS_SHARE:
        targets = Targets(pacing.choice([20, 200]), pacing.choice([4, 12, 40]))
        shape.routing = {"targets": targets, "max_local_tokens": 8}
    return Plan(
        shape=shape,
        num_clients=rng.randint(4, 12),
        num_requests=NUM_REQUESTS + rng.randrange(10),
        num_faults=NUM_FAULTS + rng.randrange(2),
        faults=faults,
        loses_on_close=rng.random() < 0.5,
    )


def run_seed(seed: int, mode: str = "safety") -> Report:
    """Run one seed. Never raises for what the cluster does: see Report.broken."""
    plan = draw(seed, mode)
    report = Report(seed, mode, _describe(plan))
    gc.disable()  # a run is short, and one collection after it cheaper than those within
    try:
        simulate(_run(seed, plan, report), _LIMIT_S)
    except (Exception, ExceptionGroup) as error:
        report.broken = report.broken or [_reason(error)]
    finally:
        gc.enable()
    return report


async def _run(seed: int, plan: Plan, report: Report) -> None:
    world = World(seed)
    world.network.loses_on_close = plan.loses_on_close
    trace = Trace(world.network)
    async with SimCluster(world, plan.shape) as cluster:
        recoveries, now = report.recoveries, virtual_loop().time
        clients = Clients(
            cluster,
            trace,
            seed,
            plan.num_requests,
            must_finish=report.mode == "liveness",
            heard=lambda request_id: recoveries.heard(request_id, now()),
            ended=recoveries.ended,
        )
        chaos = Chaos(
            cluster,
            trace,
            random.Random(f"{seed} faults"),
            recoveries,
            longest_s=_LONGEST_S[report.mode],
        )
        healed_at = 0.0

        async def faults() -> None:
            nonlocal healed_at
            await chaos.run(plan.faults, plan.num_faults)
            clients.is_enough, healed_at = True, now()
            trace.note("all faults healed")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run(plan.num_clients))
                group.create_task(faults())
            report.done_after_s = max(0.0, clients.last_done_at - healed_at)
            report.broken += clients.broken
            if chaos.struck.total() < NUM_FAULTS:
                report.broken.append("too few faults have struck")
            if report.mode == "liveness" and report.done_after_s > DONE_WITHIN_S:
                report.broken.append(f"requests took {report.done_after_s:.1f} s after the faults")
            await _probe(cluster, report.broken)
            await _come_to_rest(cluster, report.broken)
            for store in cluster.stores:
                stats = store.news.counters()
                if "disk_bytes" in stats:
                    written, loaded = (
                        int(stats["disk_blocks_written"]),
                        int(stats["disk_blocks_loaded"]),
                    )
                    trace.note(f"{cluster.name(store)} wrote {written} blocks, loaded {loaded}")
                    report.num_loaded += loaded
        finally:
            report.num_requests, report.outcomes = clients.num_requests, clients.outcomes
            report.struck, report.pairs = chaos.struck, chaos.pairs
            report.num_resumed, report.num_deliveries = clients.num_resumed, trace.num_deliveries
            report.events, report.trace_hash = trace.events, trace.hash


async def _probe(cluster: SimCluster, broken: list[str]) -> None:
    """Every gateway answers a request."""
    for index, gateway in enumerate(cluster.gateways):
        prompt = [7 + index] * 40
        try:
            async with asyncio.timeout(_PATIENCE_S):
                output = await _answered(cluster, gateway, prompt)
        except TimeoutError:
            broken.append(f"{gateway.name} answers no request after all faults have healed")
        else:
            if output != mock_output(prompt, 5):
                broken.append(f"{gateway.name} answers a request wrongly")


async def _answered(cluster: SimCluster, gateway: SimGateway, prompt: list[int]) -> list[int]:
    """Ask until it is answered: those who were away need a moment to be seen again."""
    while True:
        try:
            return await output_of(cluster.submit(prompt, 5, gateway=gateway))
        except KvbatonError:
            await asyncio.sleep(0.5)


async def _come_to_rest(cluster: SimCluster, broken: list[str]) -> None:
    """With no more requests, nothing is held anywhere."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE_S
    while (held := _held(cluster)) and loop.time() < until:  # noqa: ASYNC110 - virtual time
        await asyncio.sleep(0.5)
    broken += held
    broken += [_reason(failure) for failure in cluster.failures()]
    if cluster.num_defects:
        broken.append(f"{cluster.num_defects} internal errors")


def _held(cluster: SimCluster) -> list[str]:
    """What is not at rest. Raises AssertionError if a ledger's sums do not close."""
    held = []
    for store, ledger in zip(cluster.stores, cluster.ledgers(), strict=True):
        ledger.check()
        counts = ledger.pool.counts()
        if counts["free"] + counts["cached"] != ledger.pool.num_blocks:
            held.append(f"{cluster.name(store)} holds blocks: {counts}")
        if ledger.handoffs or ledger.num_reserved or ledger.num_waiting:
            held.append(
                f"{cluster.name(store)} holds {len(ledger.handoffs)} handoffs, "
                f"{ledger.num_reserved} reserved blocks, {ledger.num_waiting} in line"
            )
    held += [
        f"{cluster.name(worker)} holds {len(worker.role.sequences())} sequences"
        for worker in cluster.workers
        if worker.role.sequences()
    ]
    for gateway in cluster.gateways:
        num_running = gateway.dispatcher.stats()["requests_running"]
        if num_running:
            held.append(f"{gateway.name} runs {num_running:g} requests")
    return held


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_reason(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


def _describe(plan: Plan) -> str:
    shape = plan.shape
    return (
        f"{shape.mode}, {shape.num_gateways} gateways, {shape.num_stores} stores of "
        f"{shape.num_blocks} blocks and {shape.disk_bytes} bytes of disk, "
        f"{shape.num_prefill} prefill, {shape.num_decode} decode, "
        f"movers {'/'.join(shape.movers)}, hosts {'/'.join(shape.hosts)}, {shape.worker}"
    )
