"""Faults by seed. Each is injected, healed, and must prove that it struck; else it does not count.

A fault returns how often it struck: messages it held back, lost or repeated, sequences that a
process held when it died, messages that came while a process was stopped.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from common.worker.runtime import WorkerRuntime
from services.kvstore.service import KvStore
from tests.sim.cluster import Process, SimCluster, SimGateway
from tests.sim.disturbances import Chance, Disturbance, Flip, Hold, Lose, Repeat, Slow
from tests.sim.loop import virtual_loop
from tests.sim.network import Pipe
from tests.sim.trace import Trace

_MOST_TRIES = 80
_LONGEST_S = 5.0  # beyond any silence that the cluster tolerates, and for some faults far less

Fault = Callable[["Chaos"], Awaitable[tuple[int, str]]]


class Chaos:
    """Injects faults into a cluster until enough have struck. `struck` counts those by kind."""

    def __init__(self, cluster: SimCluster, trace: Trace, rng: random.Random) -> None:
        self.cluster = cluster
        self.network = cluster.world.network
        self.rng = rng
        self.struck: Counter[str] = Counter()
        self._trace = trace
        self._busy: set[int] = set()  # processes that a fault has to itself

    async def run(self, kinds: list[str], num_faults: int) -> None:
        """Each kind in turn, now and then two at once, until `num_faults` have struck."""
        for number in range(_MOST_TRIES):
            if self.struck.total() >= num_faults:
                return
            await asyncio.sleep(self.rng.uniform(0.02, 0.2))
            names = [kinds[number % len(kinds)]]
            if self.rng.random() < 0.3:
                names.append(self.rng.choice(kinds))
            await asyncio.gather(*(self._inject(name) for name in names))

    async def _inject(self, name: str) -> None:
        num_struck, detail = await (FAULTS | DISK_FAULTS)[name](self)
        if num_struck:
            self.struck[name] += 1
        self._trace.note(f"fault {name}: {detail or 'nobody'}, struck {num_struck}")

    # ---- choices --------------------------------------------------------------------------------

    async def victim(self, *kinds: type[Process], busy: bool = True) -> Process | None:
        """A process of these kinds that no other fault has, one with work if `busy`. Nobody if
        none has within a while."""
        for _ in range(50):
            free = [each for each in self._processes(kinds) if not busy or self.work_of(each)]
            if free:
                victim = self.rng.choice(free)
                self._busy.add(self.cluster.pid(victim))
                return victim
            await asyncio.sleep(0.02)
        return None

    def let_go(self, pid: int) -> None:
        """The fault has let the process go."""
        self._busy.discard(pid)

    def _processes(self, kinds: tuple[type[Process], ...]) -> list[Process]:
        cluster = self.cluster
        processes: list[Process] = [*cluster.gateways, *cluster.workers, *cluster.stores]
        return [
            each
            for each in processes
            if isinstance(each, kinds or Process)
            and cluster.is_alive(each)
            and cluster.pid(each) not in self._busy
        ]

    def work_of(self, process: Process) -> int:
        """What the process has in hand."""
        if isinstance(process, SimGateway):
            return int(process.dispatcher.stats()["requests_running"])
        if isinstance(process, KvStore):
            return len(process.broker.ledger.handoffs) if process.broker else 0
        return len(process.role.sequences())

    def while_s(self) -> float:
        """How long a fault lasts: mostly short, at times beyond all patience."""
        return (
            self.rng.uniform(0.02, 0.6)
            if self.rng.random() < 0.7
            else self.rng.uniform(0.6, _LONGEST_S)
        )

    async def last(self, seconds: float, num_struck: Callable[[], int]) -> None:
        """Let a fault last for a while; on, until it has struck, if that comes soon."""
        await asyncio.sleep(seconds)
        for _ in range(20):
            if num_struck():
                return
            await asyncio.sleep(0.05)


async def crash(chaos: Chaos, *kinds: type[Process]) -> tuple[int, str]:
    """SIGKILL; another process takes the place after a while."""
    victim = await chaos.victim(*kinds)
    if victim is None:
        return 0, ""
    cluster, detail, work = chaos.cluster, chaos.cluster.name(victim), chaos.work_of(victim)
    pid = cluster.pid(victim)
    down_s = chaos.while_s()
    if isinstance(victim, KvStore):
        await cluster.crash_store(cluster.stores.index(victim), down_s)
    else:
        await cluster.kill(victim)
        await asyncio.sleep(down_s)
        if isinstance(victim, SimGateway):
            cluster.add_gateway()
        else:
            await cluster.add_worker(detail.partition(".")[0])
    chaos.let_go(pid)
    return work, f"{detail} down for {down_s:.3f} s"


async def pause(chaos: Chaos) -> tuple[int, str]:
    """SIGSTOP, and SIGCONT after a while."""
    victim = await chaos.victim()
    if victim is None:
        return 0, ""
    loop = virtual_loop()
    pid, name, seconds = chaos.cluster.pid(victim), chaos.cluster.name(victim), chaos.while_s()
    loop.stop_process(pid)
    await asyncio.sleep(seconds)
    num_waiting = chaos.network.num_waiting(pid)
    num_late = loop.continue_process(pid)
    chaos.network.look_again()
    chaos.let_go(pid)
    return num_waiting, f"{name} for {seconds:.3f} s, {num_late} timers late"


def _between(one: int, other: int, chaos: Chaos, *, both_ways: bool) -> Callable[[Pipe], bool]:
    def test(pipe: Pipe) -> bool:
        receiver = chaos.network.receiver_of(pipe)
        sender = pipe.dealer.pid if pipe.to_router else chaos.cluster.pid_at(pipe.dealer.endpoint)
        return (sender, receiver) == (one, other) or (
            both_ways and (sender, receiver) == (other, one)
        )

    return test


def _pair(chaos: Chaos) -> tuple[Process, Process] | None:
    """Two processes that have a connection, at random."""
    dealers = [each for each in chaos.network.dealers if chaos.cluster.at(each.endpoint)]
    if not dealers:
        return None
    dealer = chaos.rng.choice(dealers)
    one, other = chaos.cluster.of_pid(dealer.pid), chaos.cluster.at(dealer.endpoint)
    return (one, other) if one is not None and other is not None else None


async def partition(chaos: Chaos, *, is_cut: bool) -> tuple[int, str]:
    """Two processes do not reach each other, one way or both. What they send comes later; if the
    connection is cut in the end, never."""
    pair = _pair(chaos)
    if pair is None:
        return 0, ""
    pids = [chaos.cluster.pid(each) for each in pair]
    names = [chaos.cluster.name(each) for each in pair]
    if chaos.rng.random() < 0.5:
        pids.reverse()
        names.reverse()
    both_ways, seconds = chaos.rng.random() < 0.5, chaos.while_s()
    hold = Hold(_between(pids[0], pids[1], chaos, both_ways=both_ways))
    network, num_lost = chaos.network, chaos.network.num_lost
    network.begin(hold)
    await chaos.last(seconds, lambda: hold.num_struck)
    if is_cut:
        for dealer in list(network.dealers):
            if {dealer.pid, chaos.cluster.pid_at(dealer.endpoint)} == set(pids):
                network.break_link(dealer)
    network.end(hold)
    await asyncio.sleep(0.01)
    struck = network.num_lost - num_lost if is_cut else hold.num_struck
    arrow = " <> " if both_ways else " > "
    return struck, f"{arrow.join(names)} for {seconds:.3f} s"


async def full(chaos: Chaos) -> tuple[int, str]:
    """A pipe takes no more until somebody has tried."""
    dealers = [each for each in chaos.network.dealers if chaos.cluster.at(each.endpoint)]
    if not dealers:
        return 0, ""
    dealer = chaos.rng.choice(dealers)
    pipe = chaos.rng.choice([dealer.incoming, dealer.outgoing])
    num_before, pipe.is_full = chaos.network.num_refused, True
    await chaos.last(0.0, lambda: chaos.network.num_refused - num_before)
    pipe.is_full = False
    return chaos.network.num_refused - num_before, pipe.name


async def disturb(
    chaos: Chaos, make: Callable[[Callable[[Pipe], bool]], Disturbance]
) -> tuple[int, str]:
    """All pipes of a process are disturbed for a while."""
    victim = await chaos.victim()
    if victim is None:
        return 0, ""
    pid, name, seconds = chaos.cluster.pid(victim), chaos.cluster.name(victim), chaos.while_s()
    chaos.let_go(pid)

    def pipes(pipe: Pipe) -> bool:
        return pid in (pipe.dealer.pid, chaos.cluster.pid_at(pipe.dealer.endpoint))

    disturbance = make(pipes)
    chaos.network.begin(disturbance)
    await chaos.last(seconds, lambda: disturbance.num_struck)
    chaos.network.end(disturbance)
    return disturbance.num_struck, f"{name} for {seconds:.3f} s"


def _some(chaos: Chaos, kind: type[Chance]) -> Awaitable[tuple[int, str]]:
    share = chaos.rng.choice([0.05, 0.5])
    return disturb(chaos, lambda pipes: kind(pipes, rng=chaos.rng, share=share))


def _slow(chaos: Chaos) -> Awaitable[tuple[int, str]]:
    most_s = chaos.rng.choice([0.02, 0.2, 1.0])
    return disturb(chaos, lambda pipes: Slow(pipes, most_s=most_s))


async def disk(chaos: Chaos, *faults: str) -> tuple[int, str]:
    """The host's disk has one of these faults for a while (tests/sim/files.py)."""
    drive, fault = chaos.cluster.world.drive, chaos.rng.choice(faults)
    if fault in drive.on:
        return 0, ""
    num_before, seconds = drive.struck[fault], chaos.while_s()
    drive.slowness = chaos.rng.choice([100.0, 3000.0])
    drive.on.add(fault)
    await chaos.last(seconds, lambda: drive.struck[fault] - num_before)
    drive.on.remove(fault)
    return drive.struck[fault] - num_before, f"{fault} for {seconds:.3f} s"


FAULTS: dict[str, Fault] = {
    "crash_worker": lambda chaos: crash(chaos, WorkerRuntime),
    "crash_store": lambda chaos: crash(chaos, KvStore),
    "crash_gateway": lambda chaos: crash(chaos, SimGateway),
    "pause": pause,
    "partition": lambda chaos: partition(chaos, is_cut=False),
    "cut": lambda chaos: partition(chaos, is_cut=True),
    "full": full,
    "slow": _slow,
    "lose": lambda chaos: _some(chaos, Lose),
    "repeat": lambda chaos: _some(chaos, Repeat),
    "flip": lambda chaos: _some(chaos, Flip),
}
DISK_FAULTS: dict[str, Fault] = {  # for clusters that have a disk
    "slow_disk": lambda chaos: disk(chaos, "slow"),
    "full_disk": lambda chaos: disk(chaos, "full"),
    "bad_disk": lambda chaos: disk(chaos, "write_error", "read_error", "torn", "lost", "flipped"),
}
