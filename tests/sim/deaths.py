"""A process goes, or stands still: killed, paused or drained. Afterwards the cluster is whole."""

from __future__ import annotations

import asyncio

from services.kvstore.service import KvStore
from tests.sim.chaos import Chaos, Strike
from tests.sim.cluster import Process
from tests.sim.loop import virtual_loop


async def kill(chaos: Chaos, strike: Strike, role: str) -> tuple[int, str]:
    """SIGKILL; another process takes the place after a while."""
    victim = await chaos.victim(strike, role)
    if victim is None:
        return 0, ""
    num_hit, name, down_s = chaos.strikes(strike, victim), chaos.cluster.name(victim), 0.0
    await chaos.cluster.kill(victim)
    down_s = chaos.while_s()
    await asyncio.sleep(down_s)
    await _replace(chaos, strike, victim, role)
    return num_hit, f"{name} down for {down_s:.3f} s"


async def drain(chaos: Chaos, strike: Strike, role: str) -> tuple[int, str]:
    """SIGTERM; another process takes the place after a while."""
    victim = await chaos.victim(strike, role)
    if victim is None:
        return 0, ""
    num_hit, name = chaos.strikes(strike, victim), chaos.cluster.name(victim)
    if not await chaos.cluster.drain(victim):
        return num_hit, f"{name}, killed meanwhile"
    down_s = chaos.while_s()
    await asyncio.sleep(down_s)
    await _replace(chaos, strike, victim, role)
    return num_hit, f"{name} down for {down_s:.3f} s"


async def pause(chaos: Chaos, strike: Strike, role: str) -> tuple[int, str]:
    """SIGSTOP, and SIGCONT after a while."""
    victim = await chaos.victim(strike, role)
    if victim is None:
        return 0, ""
    loop = virtual_loop()
    num_hit, name, seconds = chaos.strikes(strike, victim), chaos.cluster.name(victim), 0.0
    pid, seconds = strike.pid, chaos.pause_s()
    loop.stop_process(pid)
    await asyncio.sleep(seconds)
    if not loop.is_stopped(pid):
        return num_hit, f"{name}, killed meanwhile"
    num_waiting = chaos.network.num_waiting(pid)
    num_late = loop.continue_process(pid)
    chaos.network.look_again()
    chaos.let_go(pid)
    return min(num_hit, num_waiting), f"{name} for {seconds:.3f} s, {num_late} timers late"


async def _replace(chaos: Chaos, strike: Strike, gone: Process, role: str) -> None:
    cluster, successor = chaos.cluster, gone
    if isinstance(gone, KvStore):
        index = cluster.stores.index(gone)
        await cluster.start_store(index)
        successor = cluster.stores[index]
    elif role == "gateway":
        successor = cluster.add_gateway()
    else:
        successor = await cluster.add_worker(role)
    chaos.let_go(strike.pid, successor)
