"""Faults and pairs of faults by seed: a second one comes at a random moment while the cluster still
recovers from the first, and may hit the same process again, or a peer of it.

Each fault (deaths.py, faults.py) is injected, healed, and must prove that it struck; else it does
not count.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Process, SimCluster
from tests.sim.loop import virtual_loop
from tests.sim.recovery import Hit, Recoveries, hit_of
from tests.sim.trace import Trace

ROLES = ("prefill", "decode", "store", "gateway")
_MOST_TRIES = 40
_PAIRS = 0.65  # of the faults have a second one
_LOOKS = 400
_LOOK_S = 0.0025
_SEEKS = 0.4  # of the faults look for a request in a certain state
_STATES = ("waiting", "reserved", "filling", "sealed", "aborting", "held")


@dataclass(eq=False)
class Strike:
    """One fault on its way. `first` is what it follows, `aim` what of that it is aimed at: the
    "same" process again, a "peer" of it, or "any". `state`: of a handoff that it would rather hit.
    """

    kind: str
    first: Strike | None = None
    aim: str = "any"
    state: str = ""
    is_alone: bool = False  # no second one follows
    pid: int = 0  # the process that was struck, and who else serves the same requests
    hit: Hit = field(default_factory=Hit)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    is_during: bool = False  # it struck while the cluster recovered from the first


Fault = Callable[["Chaos", Strike], Awaitable[tuple[int, str]]]


class Chaos:
    """Injects faults into a cluster. `struck` counts by kind those that have struck, `pairs` those
    of which the second struck during recovery from the first.

    `longest_s`: how long a process is down or a connection disturbed at most. `recoveries` is told
    what is hit.
    """

    def __init__(
        self,
        cluster: SimCluster,
        trace: Trace,
        rng: random.Random,
        recoveries: Recoveries,
        *,
        longest_s: float,
    ) -> None:
        self.cluster = cluster
        self.network = cluster.world.network
        self.rng = rng
        self.struck: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str, str]] = Counter()  # first, second, aim
        self._trace = trace
        self._recoveries = recoveries
        self._longest_s = longest_s
        self._busy: set[int] = set()  # processes that a fault has to itself
        self._successors: dict[int, int] = {}  # by process number

    async def run(self, faults: dict[str, Fault], num_episodes: int) -> None:
        """One or two faults at a time, until so many times they have struck."""
        num_struck = 0
        for _ in range(_MOST_TRIES):
            if num_struck >= num_episodes:
                return
            await asyncio.sleep(self.rng.uniform(0.02, 0.2))
            num_struck += await self._episode(faults)

    async def _episode(self, faults: dict[str, Fault]) -> bool:
        kinds = list(faults)
        is_alone = self.rng.random() >= _PAIRS
        first = Strike(self.rng.choice(kinds), state=self._state(), is_alone=is_alone)
        running = asyncio.ensure_future(self._inject(first, faults[first.kind]))
        if is_alone:
            return await running
        begun = asyncio.ensure_future(first.begun.wait())
        await asyncio.wait([begun, running], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if first.begun.is_set():
            await asyncio.sleep(self.rng.uniform(0, self.rng.choice([0.005, 0.05, 0.8])))
            second = self._second(first, kinds)
            if await self._inject(second, faults[second.kind]) and second.is_during:
                self.pairs[first.kind, second.kind, second.aim] += 1
        return await running

    def _second(self, first: Strike, kinds: list[str]) -> Strike:
        aim = self.rng.choice(["same", "peer", "any"])
        _, _, role = first.kind.partition("_")
        again = [kind for kind in kinds if role in ROLES and kind.endswith(f"_{role}")]
        if aim == "same" and again:
            return Strike(self.rng.choice(again), first, aim)
        aim = "any" if aim == "same" else aim
        return Strike(self.rng.choice(kinds), first, aim, self._state())

    def _state(self) -> str:
        return self.rng.choice(_STATES) if self.rng.random() < _SEEKS else ""

    async def _inject(self, strike: Strike, fault: Fault) -> bool:
        num_struck, detail = await fault(self, strike)
        strike.is_over = True
        self.struck[strike.kind] += bool(num_struck)
        after = f" after {strike.first.kind}, {strike.aim}" if strike.first else ""
        self._trace.note(f"fault {strike.kind}{after}: {detail or 'nobody'}, struck {num_struck}")
        return bool(num_struck)

    # ---- what faults do -------------------------------------------------------------------------

    def strikes(self, strike: Strike, process: Process) -> int:
        """The fault begins now, at this process, and is over for it at `let_go`. Returns how many
        requests it hits; for a second fault also those that wait because of the first."""
        now, first = virtual_loop().time(), strike.first
        strike.pid, strike.hit = self.cluster.pid(process), hit_of(self.cluster, process)
        if first is not None:
            is_open = self._recoveries.is_open(first.hit.states)
            strike.is_during = is_open or not first.is_over or strike.aim == "same"
        if strike.kind.rpartition("_")[2] in ROLES:
            label = strike.kind if strike.is_alone else f"{strike.kind} in pair"
            self._recoveries.begin(label, strike.hit.states, now)
        self._trace.note(f"{strike.kind} of {self.cluster.name(process)} begins")
        strike.begun.set()
        return len(strike.hit.states) + strike.is_during

    async def victim(self, strike: Strike, role: str = "") -> Process | None:
        """A process of the role that no other fault has: what the strike is aimed at, else one
        with work, of the kind that it seeks if there is one soon. Nobody if none has within a
        while."""
        if strike.first is not None and strike.aim == "same":
            return await self._same(strike.first, is_kill=strike.kind.startswith("kill"))
        for number in range(_LOOKS):
            free = [each for each in self._of(role) if self.cluster.pid(each) not in self._busy]
            if strike.state and number < _LOOKS / 2:
                free = [each for each in free if strike.state in self._states(each)]
            elif strike.first is None:
                free = [each for each in free if self._states(each)]
            elif strike.aim == "peer":
                peers = strike.first.hit.peers
                free = [each for each in free if self.cluster.pid(each) in peers] or free
            if free:
                return self._taken(self.rng.choice(free))
            await asyncio.sleep(_LOOK_S)
        return None

    async def _same(self, first: Strike, *, is_kill: bool) -> Process | None:
        """The process again, or what has taken its place. Whatever state it is in, it can be
        killed."""
        await asyncio.sleep(self.rng.uniform(0, 0.1))
        for _ in range(6 * _LOOKS):
            pid = first.pid
            while pid in self._successors:
                pid = self._successors[pid]
            process = self.cluster.of_pid(pid)
            if process is not None and (is_kill or pid not in self._busy):
                return self._taken(process)
            await asyncio.sleep(_LOOK_S)
        return None

    def _states(self, process: Process) -> set[str]:
        return set(hit_of(self.cluster, process).states.values())

    def _taken(self, process: Process) -> Process:
        self._busy.add(self.cluster.pid(process))
        return process

    def let_go(self, pid: int, successor: Process | None = None) -> None:
        """The fault has let the process go; another may have taken its place."""
        self._busy.discard(pid)
        if successor is not None:
            self._successors[pid] = self.cluster.pid(successor)

    def _of(self, role: str) -> list[Process]:
        """The living processes of a role, or all."""
        cluster = self.cluster
        live: dict[str, list[Process]] = {
            "prefill": [*cluster.of_role(PrefillRole)],
            "decode": [*cluster.of_role(DecodeRole)],
            "store": [store for store in cluster.stores if cluster.is_alive(store)],
            "gateway": [*cluster.gateways],
        }
        return live[role] if role else [each for of_role in live.values() for each in of_role]

    def while_s(self) -> float:
        """How long a fault lasts: mostly short, at times as long as it may."""
        is_short = self.rng.random() < 0.7
        return self.rng.uniform(0.02, 0.6) if is_short else self.rng.uniform(0.6, self._longest_s)

    def pause_s(self) -> float:
        """How long a process is paused: mostly past its lease."""
        lease_s = self.cluster.shape.lost_after_s
        is_long = self.rng.random() < 0.7
        return lease_s + self.rng.uniform(0.2, 1.5) if is_long else self.rng.uniform(0.02, 0.6)

    async def last(self, seconds: float, num_struck: Callable[[], int]) -> None:
        """Let a fault last for a while; on, until it has struck, if that comes soon."""
        await asyncio.sleep(seconds)
        for _ in range(20):
            if num_struck():
                return
            await asyncio.sleep(0.05)
