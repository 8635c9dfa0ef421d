"""An operator's commands in the simulated cluster: status, drain and log level."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from common.engine.mock import mock_output
from common.messages import Drain
from kvbaton import operations
from kvbaton.errors import ConnectionLostError, InvalidRequestError, KvbatonError, NotFoundError
from kvbaton.operations import Drained, LogLevelSet, MemberStatus, Standing
from services.decode.worker import DecodeRole
from services.gateway.access.admin import Admin
from services.gateway.access.operator import Operator
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Process, SimCluster, output_of, simulate, until
from tests.sim.loop import virtual_loop
from tests.sim.stranger import STRANGER_ID, Stranger
from tests.sim.test_cluster_in_memory import SHAPES
from tests.sim.world import World

KEY = "the operators' key"


async def command(cluster: SimCluster, message: operations.Operation) -> operations.Outcome:
    """Carried out by the first gateway, as its face has it done."""
    gateway = cluster.gateways[0]
    fleet = gateway.dispatcher.fleet
    operator = Operator(fleet.stores, fleet.workers, name=gateway.name, model="mock")
    admin = Admin(KEY, fleet.stores, gateway.seams.clock, operator)
    (answer,) = [each async for each in admin.answer(message)]
    assert not isinstance(answer, operations.Operation)
    return answer  # type: ignore[return-value]


async def status(cluster: SimCluster) -> Standing:
    answer = await command(cluster, operations.Status(id=1, admin_key=KEY))
    assert isinstance(answer, Standing)
    return answer


async def drain(cluster: SimCluster, member: str, *, force: bool = False) -> Drained:
    message = operations.Drain(id=2, admin_key=KEY, member=member, force=force)
    answer = await command(cluster, message)
    assert isinstance(answer, Drained)
    return answer


def of_name(standing: Standing, name: str) -> MemberStatus:
    (member,) = [each for each in standing.members if each.name == name]
    return member


@pytest.mark.parametrize("name", ["two_gateways", "two_stores"])
def test_everybody_is_told_of_once_with_what_they_do(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES[name]) as cluster:
            streams = [cluster.submit([7 + index] * 40, 400) for index in range(4)]
            await asyncio.sleep(2)  # gateways tell the stores how they are with their heartbeats
            standing = await status(cluster)
            everyone: list[Process] = [*cluster.gateways, *cluster.workers]
            names = [cluster.name(each) for each in everyone]
            assert sorted(each.name for each in standing.members) == sorted(names)
            assert [each.role for each in standing.members] == (
                ["gateway"] * len(cluster.gateways) + ["prefill"] * 2 + ["decode"] * 2
            )
            assert {each.state for each in standing.members} == {"ready"}
            assert {each.version for each in standing.members} == {standing.version}
            assert all(each.age_s is not None and each.age_s > 1 for each in standing.members)
            decode = [each for each in standing.members if each.role == "decode"]
            assert sum(each.num_running for each in decode) == 4
            gateways = [each for each in standing.members if each.role == "gateway"]
            assert sum(each.num_running for each in gateways) == 4
            assert [each.name for each in standing.stores] == [
                store.config.name for store in cluster.stores
            ]
            for store in standing.stores:
                assert store.num_blocks == sum(store.blocks.values()) > 0
            assert sum(store.handoffs["claimed"] for store in standing.stores) == 4
            for stream in streams:
                stream.cancel()
            await cluster.settle()

    simulate(main())


def test_a_store_that_is_away_and_a_worker_that_is_lost_are_told_of() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["two_stores"]) as cluster:
            streams = [cluster.submit([7 + index] * 40, 250) for index in range(4)]
            reading = [asyncio.create_task(output_of(stream)) for stream in streams]
            victim = cluster.of_role(DecodeRole)[0]
            await until(lambda: any(each.num_computed > 40 for each in victim.role.sequences()))
            virtual_loop().stop_process(cluster.pid(victim))  # it may still write, and is silent
            await asyncio.sleep(10)
            assert of_name(await status(cluster), cluster.name(victim)).state == "lost"
            virtual_loop().continue_process(cluster.pid(victim))
            await asyncio.gather(*reading)
            await asyncio.sleep(3)  # it says hello again
            assert of_name(await status(cluster), cluster.name(victim)).state == "ready"
            await cluster.kill(cluster.stores[1])
            await asyncio.sleep(0.1)
            problems = [store.problem for store in (await status(cluster)).stores]
            assert problems == ["", "it cannot be reached"]
            await cluster.start_store(1)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", ["shm", "zmq", "colocated", "two_stores_zmq"])
@pytest.mark.parametrize("seed", range(2))
def test_a_drained_worker_hands_on_all_that_it_has_and_stays(name: str, seed: int) -> None:
    async def main() -> None:
        async with SimCluster(World(seed), SHAPES[name]) as cluster:
            rng = cluster.world.random
            prompts = [[rng.randrange(5, 2000)] * rng.randrange(1, 200) for _ in range(10)]
            streams = [cluster.submit(prompt, 80) for prompt in prompts]
            reading = [asyncio.create_task(output_of(stream)) for stream in streams]
            await asyncio.sleep(rng.uniform(0, 0.2))
            victims = [cluster.of_role(DecodeRole)[0]]
            victims += cluster.of_role(PrefillRole)[:1]
            for victim in victims:
                drained = await drain(cluster, cluster.name(victim))
                assert drained.name == cluster.name(victim)
                assert victim.role.sequences() == []
                assert cluster.is_alive(victim)
            more = [cluster.submit(prompt, 20) for prompt in prompts[:4]]
            for stream in more:
                await output_of(stream)
            assert [await task for task in reading] == [mock_output(p, 80) for p in prompts]
            assert not any(victim.role.sequences() for victim in victims)
            standing = await status(cluster)
            states = [of_name(standing, cluster.name(victim)).state for victim in victims]
            assert states == ["drained"] * len(victims)
            assert (await drain(cluster, cluster.name(victims[0]))).id == 2  # once more: at once
            await cluster.settle()
            assert await cluster.drain(victims[0])  # SIGTERM ends it
            await cluster.settle()

    simulate(main())


def test_the_last_of_a_role_is_drained_by_force_alone_and_another_takes_over() -> None:
    async def main() -> None:
        async with SimCluster(World(1), replace(SHAPES["shm"], num_decode=1)) as cluster:
            (only,) = cluster.of_role(DecodeRole)
            stream = cluster.submit([7] * 40, 300)
            reading = asyncio.create_task(output_of(stream))
            await asyncio.sleep(0.2)
            with pytest.raises(InvalidRequestError, match="no other decode worker takes work"):
                await drain(cluster, cluster.name(only))
            assert not only.is_draining
            await drain(cluster, cluster.name(only), force=True)
            await cluster.add_worker("decode")
            assert await reading == mock_output([7] * 40, 300)
            await cluster.settle()

    simulate(main())


def test_a_worker_goes_by_its_name_an_id_or_how_that_begins() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["two_stores"]) as cluster:
            victim = cluster.of_role(DecodeRole)[0]
            member_id = victim.stores[1].member_id
            with pytest.raises(NotFoundError, match=f"no worker {member_id[:7]}; there are"):
                await drain(cluster, member_id[:7])
            with pytest.raises(NotFoundError, match="no worker decod; did you mean decode"):
                await drain(cluster, "decod")
            with pytest.raises(InvalidRequestError, match="4 workers are called all: say the id"):
                await drain(cluster, "all")
            assert (await drain(cluster, member_id[:8])).name == cluster.name(victim)
            assert victim.is_draining

    simulate(main())


def test_a_drain_that_was_meant_for_a_former_incarnation_is_refused() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["shm"]) as cluster:
            worker = cluster.of_role(DecodeRole)[0]
            stranger = Stranger(cluster, worker.endpoint)
            assert await stranger.hello("gateway", fingerprint="") == "Welcome"
            assert await stranger.ask(Drain(worker_id=STRANGER_ID)) == "stale"
            assert not worker.is_draining

    simulate(main())


def test_a_worker_that_dies_while_it_drains_ends_the_waiting() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["shm"]) as cluster:
            victim = cluster.of_role(DecodeRole)[0]
            streams = [cluster.submit([7 + index] * 40, 300) for index in range(6)]
            reading = [asyncio.create_task(output_of(stream)) for stream in streams]
            await until(lambda: any(victim.role.sequences()))
            draining = asyncio.create_task(drain(cluster, cluster.name(victim)))
            await until(lambda: victim.is_draining)
            await cluster.kill(victim)
            with pytest.raises(ConnectionLostError):
                await draining
            outputs = [await task for task in reading]
            assert outputs == [mock_output([7 + index] * 40, 300) for index in range(6)]
            await cluster.settle()

    simulate(main())


# ---- log level ----------------------------------------------------------------------------------


def test_a_level_reaches_whom_it_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[str] = []
    for module in (
        "services.gateway.access.operator",
        "services.gateway.routing.fleet",
        "services.kvstore.admin",
        "common.worker.runtime",
    ):
        monkeypatch.setattr(f"{module}.change_log_level", changed.append)

    async def level(cluster: SimCluster, member: str) -> LogLevelSet:
        changed.clear()
        message = operations.SetLogLevel(id=3, admin_key=KEY, member=member, level="debug")
        answer = await command(cluster, message)
        assert isinstance(answer, LogLevelSet)
        await asyncio.sleep(0.1)
        return answer

    async def main() -> None:
        shape = replace(SHAPES["two_gateways"], num_stores=2)
        async with SimCluster(World(1), shape) as cluster:
            everyone: list[Process] = [*cluster.gateways, *cluster.workers]
            names = [cluster.name(each) for each in everyone]
            names += [store.config.name for store in cluster.stores]
            answer = await level(cluster, "all")
            assert (sorted(answer.names), answer.problems) == (sorted(names), {})
            assert changed == ["debug"] * 8
            for name in names:
                assert (await level(cluster, name)).names == [name]
                assert changed == ["debug"], name
            member_id = cluster.workers[0].stores[1].member_id
            assert (await level(cluster, member_id)).names == [cluster.name(cluster.workers[0])]
            with pytest.raises(NotFoundError, match="did you mean decode"):
                await level(cluster, "decode")
            await cluster.kill(cluster.stores[1])
            await asyncio.sleep(0.1)
            answer = await level(cluster, "all")
            assert len(answer.names) == 7
            assert list(answer.problems.values()) == ["it cannot be reached"]
            await cluster.start_store(1)

    simulate(main())


def test_without_the_key_nothing_is_done() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["shm"]) as cluster:
            name = cluster.name(cluster.workers[0])
            for message in (
                operations.Status(id=1, admin_key=""),
                operations.Drain(id=1, admin_key="no", member=name),
                operations.SetLogLevel(id=1, admin_key=KEY[:-1], member="all", level="debug"),
            ):
                with pytest.raises(KvbatonError, match="not the gateway's admin key"):
                    await command(cluster, message)
            assert not any(worker.is_draining for worker in cluster.workers)

    simulate(main())
