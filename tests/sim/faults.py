"""The faults: of processes (deaths.py), of connections, and of disks.

A fault returns how often it struck: requests that a process served when it died, messages that came
while a process was stopped, messages that were held back, lost or repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from tests.sim.chaos import ROLES, Chaos, Fault, Strike
from tests.sim.cluster import Process
from tests.sim.deaths import drain, kill, pause
from tests.sim.disturbances import Chance, Disturbance, Flip, Hold, Lose, Repeat, Slow
from tests.sim.network import Pipe, SimDealer


def _between(one: int, other: int, chaos: Chaos, *, both_ways: bool) -> Callable[[Pipe], bool]:
    def test(pipe: Pipe) -> bool:
        receiver = chaos.network.receiver_of(pipe)
        sender = pipe.dealer.pid if pipe.to_router else chaos.cluster.pid_at(pipe.dealer.endpoint)
        return (sender, receiver) == (one, other) or (
            both_ways and (sender, receiver) == (other, one)
        )

    return test


def _dealers(chaos: Chaos, strike: Strike) -> list[SimDealer]:
    """Connections with a process at each end: of those that a second fault is aimed at, if any."""
    cluster = chaos.cluster
    dealers = [each for each in chaos.network.dealers if cluster.at(each.endpoint)]
    dealers = [each for each in dealers if cluster.of_pid(each.pid)]
    if strike.first is not None and strike.aim != "any":
        pids = {strike.first.pid, *strike.first.hit.peers}
        near = [d for d in dealers if d.pid in pids and cluster.pid_at(d.endpoint) in pids]
        return near or dealers
    return dealers


def _pair(chaos: Chaos, strike: Strike) -> tuple[Process, Process] | None:
    """Two processes that have a connection, at random."""
    dealers = _dealers(chaos, strike)
    if not dealers:
        return None
    dealer = chaos.rng.choice(dealers)
    one, other = chaos.cluster.of_pid(dealer.pid), chaos.cluster.at(dealer.endpoint)
    assert one is not None
    assert other is not None
    return one, other


async def partition(chaos: Chaos, strike: Strike, *, is_cut: bool) -> tuple[int, str]:
    """Two processes do not reach each other, one way or both. What they send comes later; if the
    connection is cut in the end, never."""
    pair = _pair(chaos, strike)
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
    chaos.strikes(strike, pair[0])
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


async def full(chaos: Chaos, strike: Strike) -> tuple[int, str]:
    """A pipe takes no more until somebody has tried."""
    dealers = _dealers(chaos, strike)
    if not dealers:
        return 0, ""
    dealer = chaos.rng.choice(dealers)
    pipe = chaos.rng.choice([dealer.incoming, dealer.outgoing])
    num_before, pipe.is_full = chaos.network.num_refused, True
    struck = chaos.cluster.of_pid(dealer.pid)
    assert struck is not None
    chaos.strikes(strike, struck)
    await chaos.last(0.0, lambda: chaos.network.num_refused - num_before)
    pipe.is_full = False
    return chaos.network.num_refused - num_before, pipe.name


async def disturb(
    chaos: Chaos, strike: Strike, make: Callable[[Callable[[Pipe], bool]], Disturbance]
) -> tuple[int, str]:
    """All pipes of a process are disturbed for a while."""
    victim = await chaos.victim(strike)
    if victim is None:
        return 0, ""
    pid, name, seconds = chaos.cluster.pid(victim), chaos.cluster.name(victim), chaos.while_s()
    chaos.let_go(pid)
    chaos.strikes(strike, victim)

    def pipes(pipe: Pipe) -> bool:
        return pid in (pipe.dealer.pid, chaos.cluster.pid_at(pipe.dealer.endpoint))

    disturbance = make(pipes)
    chaos.network.begin(disturbance)
    await chaos.last(seconds, lambda: disturbance.num_struck)
    chaos.network.end(disturbance)
    return disturbance.num_struck, f"{name} for {seconds:.3f} s"


async def _some(chaos: Chaos, strike: Strike, kind: type[Chance]) -> tuple[int, str]:
    share = chaos.rng.choice([0.05, 0.5])
    return await disturb(chaos, strike, lambda pipes: kind(pipes, rng=chaos.rng, share=share))


async def _slow(chaos: Chaos, strike: Strike) -> tuple[int, str]:
    most_s = chaos.rng.choice([0.02, 0.2, 1.0])
    return await disturb(chaos, strike, lambda pipes: Slow(pipes, most_s=most_s))


async def disk(chaos: Chaos, strike: Strike, *faults: str) -> tuple[int, str]:
    """The host's disk has one of these faults for a while (tests/sim/files.py)."""
    drive, fault = chaos.cluster.world.drive, chaos.rng.choice(faults)
    store = next((each for each in chaos.cluster.stores if chaos.cluster.is_alive(each)), None)
    if fault in drive.on or store is None:
        return 0, ""
    num_before, seconds = drive.struck[fault], chaos.while_s()
    drive.slowness = chaos.rng.choice([100.0, 3000.0])
    drive.on.add(fault)
    chaos.strikes(strike, store)
    await chaos.last(seconds, lambda: drive.struck[fault] - num_before)
    drive.on.remove(fault)
    return drive.struck[fault] - num_before, f"{fault} for {seconds:.3f} s"


PROCESS_FAULTS: dict[str, Fault] = {
    f"{fault.__name__}_{role}": partial(fault, role=role)
    for fault in (kill, pause, drain)
    for role in ROLES
}
LINK_FAULTS: dict[str, Fault] = {
    "partition": partial(partition, is_cut=False),
    "cut": partial(partition, is_cut=True),
    "full": full,
    "slow": _slow,
    "lose": partial(_some, kind=Lose),
    "repeat": partial(_some, kind=Repeat),
    "flip": partial(_some, kind=Flip),
}
DISK_FAULTS: dict[str, Fault] = {  # for clusters that have a disk
    "slow_disk": lambda chaos, strike: disk(chaos, strike, "slow"),
    "full_disk": lambda chaos, strike: disk(chaos, strike, "full"),
    "bad_disk": lambda chaos, strike: disk(
        chaos, strike, "write_error", "read_error", "torn", "lost", "flipped"
    ),
}
