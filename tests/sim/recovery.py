"""What a fault hits: requests, in which states of their handoffs, and how soon they go on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.kvstore.handoff import Handoff
from services.kvstore.service import KvStore
from tests.sim.cluster import Process, SimCluster
from tests.sim.gateway import SimGateway

UNOPENED = "unopened"  # the state of a request whose gateway has no handoff of it
_ON_ITS_WAY_S = 0.002  # what was sent before a fault is no sign of life after it


@dataclass
class Hit:
    """The requests that need a process, each with the state it is in, and who else serves them."""

    states: dict[str, str] = field(default_factory=dict)  # by request id
    peers: set[int] = field(default_factory=set)  # process numbers


def hit_of(cluster: SimCluster, process: Process) -> Hit:
    """What is hit if the process goes now."""
    hit, pid = Hit(), cluster.pid(process)
    if isinstance(process, SimGateway):
        running = [stream for stream in process.streams if not stream.is_over]
        hit.states = dict.fromkeys((stream.request_id for stream in running), UNOPENED)
    for store in cluster.stores:
        if not cluster.is_alive(store) or store.broker is None:
            continue
        for handoff in store.broker.ledger.handoffs.values():
            pids = _pids(store, handoff)
            is_hit = any(pids[member] == pid and handoff.needs(member) for member in pids)
            if store is process or is_hit:
                hit.states[handoff.request_id] = handoff.state.value
                hit.peers |= {*pids.values(), cluster.pid(store)}
    hit.peers -= {pid, 0}
    return hit


def _pids(store: KvStore, handoff: Handoff) -> dict[str, int]:
    ids = (handoff.gateway_id, handoff.prefill_id, handoff.decode_id)
    members = {each: store._members.get(each) for each in ids}
    return {each: 0 if member is None else member.pid for each, member in members.items()}


class Recoveries:
    """How long after a fault each request that it hit had its next token. Pure: the time is passed
    in. `times_s` are by kind of fault, `states` count what the requests were in."""

    def __init__(self) -> None:
        self.times_s: dict[str, list[float]] = defaultdict(list)
        self.states: Counter[str] = Counter()
        self._open: dict[str, list[tuple[str, float]]] = defaultdict(list)  # by request id

    def begin(self, kind: str, states: dict[str, str], now: float) -> None:
        """A fault hits these requests."""
        self.states.update(states.values())
        for request_id in states:
            self._open[request_id].append((kind, now))

    def heard(self, request_id: str, now: float) -> None:
        """Its client has a new token."""
        waiting = self._open.get(request_id)
        if not waiting:
            return
        for kind, at in waiting:
            if now - at > _ON_ITS_WAY_S:
                self.times_s[kind].append(now - at)
        self._open[request_id] = [each for each in waiting if now - each[1] <= _ON_ITS_WAY_S]

    def ended(self, request_id: str) -> None:
        """It is over, in whatever way."""
        self._open.pop(request_id, None)

    def is_open(self, request_ids: Iterable[str]) -> bool:
        """Whether one of them waits still."""
        return any(self._open.get(each) for each in request_ids)


def percentiles(times_s: list[float]) -> tuple[float, float, float]:
    """The median, p99 and the longest."""
    ordered = sorted(times_s)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]
