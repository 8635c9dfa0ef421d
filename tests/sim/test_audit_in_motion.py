"""An audit asked for at any moment closes: while requests run, are cancelled, give way or fail."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from common.messages import AskAudit, AskWhy, Holdings
from kvbaton.admin import StoreAudit
from kvbaton.errors import KvbatonError
from kvbaton.protocol import Audit, Audited
from services.decode.worker import DecodeRole
from services.gateway.access.admin import Admin
from tests.sim.cluster import STORES, Shape, SimCluster, output_of, simulate
from tests.sim.loop import virtual_loop
from tests.sim.stranger import Stranger
from tests.sim.test_cluster_in_memory import SHAPES, random_prompt
from tests.sim.world import World

KEY = "the operators' key"


async def audited(cluster: SimCluster) -> list[StoreAudit]:
    """Asked through the first gateway, as its face does."""
    gateway = cluster.gateways[0]
    admin = Admin(KEY, gateway.dispatcher.fleet.stores, gateway.seams.clock)
    (answer,) = [each async for each in admin.answer(Audit(id=1, admin_key=KEY))]
    assert isinstance(answer, Audited)
    problems = [(store.problem, store.discrepancies) for store in answer.stores]
    assert answer.closes, problems
    return answer.stores


async def ask_at_random(cluster: SimCluster, rng: random.Random) -> None:
    """A request that may be cancelled at any step."""
    await asyncio.sleep(rng.uniform(0, 2))
    stream = cluster.submit(random_prompt(rng), rng.randrange(1, 60))
    if rng.random() < 0.4:
        asyncio.get_running_loop().call_later(rng.uniform(0, 0.3), stream.cancel)
        return
    with contextlib.suppress(KvbatonError):  # its worker was killed, and no other was there
        await output_of(stream)


async def run_and_audit(shape: Shape, seed: int, *, kills: bool) -> tuple[int, int]:
    """Returns how many audits there were, and how many saw handoffs under way."""
    async with SimCluster(World(seed), shape) as cluster:
        rng = random.Random(seed)
        asking = [asyncio.create_task(ask_at_random(cluster, rng)) for _ in range(30)]
        num_audits = num_busy = 0
        while not all(task.done() for task in asking):
            await asyncio.sleep(rng.uniform(0, 0.03))
            stores = await audited(cluster)
            num_audits += 1
            num_busy += any(store.oldest_handoffs for store in stores)
            if kills and num_audits == 10:
                await cluster.kill(cluster.of_role(DecodeRole)[0])
        await asyncio.gather(*asking)
        await cluster.settle()
        for store in await audited(cluster):
            assert not store.warnings
            assert store.handoffs == dict.fromkeys(store.handoffs, 0)
        return num_audits, num_busy


@pytest.mark.parametrize("name", ["shm", "zmq", "colocated", "two_stores_zmq"])
def test_every_audit_closes_while_requests_come_and_go(name: str) -> None:
    num_audits, num_busy = simulate(run_and_audit(SHAPES[name], 1, kills=False))
    assert num_audits >= num_busy > 10


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_every_audit_closes_while_sequences_give_way(name: str) -> None:
    shape = replace(SHAPES[name], num_blocks=48)
    assert simulate(run_and_audit(shape, 2, kills=False))[1] > 10


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_every_audit_closes_when_a_worker_is_killed(name: str) -> None:
    assert simulate(run_and_audit(SHAPES[name], 3, kills=True))[1] > 10


async def audits_of_a_stopped_worker() -> tuple[StoreAudit, StoreAudit, StoreAudit]:
    """When it is silent, when it is lost, and when it has come back."""
    async with SimCluster(World(5), Shape()) as cluster:
        stream = cluster.submit(list(range(5, 205)), 4000)
        await asyncio.sleep(0.5)
        loop = virtual_loop()
        pid = cluster.pid(cluster.of_role(DecodeRole)[0])
        loop.stop_process(pid)
        (silent,) = await audited(cluster)
        await asyncio.sleep(10)
        stream.cancel()
        (lost,) = await audited(cluster)
        loop.continue_process(pid)
        cluster.world.network.look_again()
        await cluster.settle()
        (back,) = await audited(cluster)
        return silent, lost, back


def test_who_does_not_answer_is_named_and_so_is_who_may_still_write() -> None:
    silent, lost, back = simulate(audits_of_a_stopped_worker())
    (row,) = [each for each in silent.members if each.role == "decode"]
    assert (row.state, row.answer) == ("here", "did not answer")
    assert row.num_leased > 0
    assert silent.warnings == [f"{row.name} did not answer; what it holds is not verified"]
    (gone,) = [each for each in lost.members if each.role == "decode"]
    assert (gone.state, gone.num_quarantined) == ("lost", row.num_leased)
    assert len(gone.quarantined) == lost.blocks["quarantined"] == row.num_leased
    assert gone.waits_for == f"{gone.name} must end, or come back and say that it has stopped"
    assert (back.blocks["quarantined"], back.warnings) == (0, [])


async def audited_with_a_fault(cluster: SimCluster) -> StoreAudit:
    """Of the one store, whose audit must not close."""
    gateway = cluster.gateways[0]
    admin = Admin(KEY, gateway.dispatcher.fleet.stores, gateway.seams.clock)
    (answer,) = [each async for each in admin.answer(Audit(id=1, admin_key=KEY))]
    assert isinstance(answer, Audited)
    assert not answer.closes
    return answer.stores[0]


async def audits_of_a_forgetful_worker() -> list[str]:
    async with SimCluster(World(6), Shape()) as cluster:
        stream = cluster.submit(list(range(5, 100)), 400)
        await asyncio.sleep(0.5)
        lease = cluster.of_role(DecodeRole)[0].stores[0].lease
        block = lease.take()
        assert block is not None
        store = await audited_with_a_fault(cluster)
        lease.add([block])
        stream.cancel()
        return store.discrepancies


def test_a_block_that_a_worker_has_forgotten_is_found() -> None:
    (discrepancy,) = simulate(audits_of_a_forgetful_worker())
    assert "which it does not know of" in discrepancy


async def audit_with_a_liar() -> StoreAudit:
    async with SimCluster(World(7), Shape()) as cluster:
        liar = Stranger(cluster, STORES[0])
        assert await liar.hello("decode") == "Welcome"
        assert await liar.ask(AskAudit()) == "forbidden"
        assert await liar.ask(AskWhy(block=1)) == "forbidden"
        assert await liar.ask(Holdings(audit_id=1, spare=[2**31 - 1])) == ""  # nobody has asked
        asking = asyncio.create_task(audited_with_a_fault(cluster))
        await asyncio.sleep(0.01)
        for spare in ([5, 100_000], []):
            assert await liar.ask(Holdings(audit_id=1, spare=spare)) == ""
        return await asking


def test_a_worker_that_claims_what_is_not_its_own_is_named() -> None:
    store = simulate(audit_with_a_liar())
    assert store.discrepancies == [
        f"stranger: it may write block {block} as it says, which is not granted to it"
        for block in (5, 100_000)
    ]
    says = {member.name: member.answer for member in store.members}
    assert says.pop("stranger") == "differs"
    assert set(says.values()) == {"agrees"}


async def many_audits_at_once() -> tuple[list[str], str]:
    async with SimCluster(World(8), Shape()) as cluster:
        silent, asker = Stranger(cluster, STORES[0]), Stranger(cluster, STORES[0])
        assert await silent.hello("decode") == "Welcome"
        assert await asker.hello("gateway", member_id="d" * 32) == "Welcome"
        first = [await asker.ask(AskAudit()) for _ in range(9)]
        await asyncio.sleep(2)
        return first, await asker.ask(AskWhy(block=3))


def test_audits_under_way_are_bounded() -> None:
    first, later = simulate(many_audits_at_once())
    assert first == [""] * 8 + ["overloaded"]
    assert later == "Told"
