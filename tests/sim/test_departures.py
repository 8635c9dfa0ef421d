"""Processes that go at a bad moment, in the simulated cluster."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.messages import Failed, StaleError
from services.decode.worker import DecodeRole
from services.kvstore.handoff import HandoffState
from tests.sim.cluster import DATA, STORES, Shape, SimCluster, listen, output_of, simulate, until
from tests.sim.network import Pipe
from tests.sim.world import World


def test_a_gateway_that_vanishes_does_not_disturb_streams_of_another() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            # On another host: the decode worker is the first to see it gone, when it sends tokens.
            victim = cluster.add_gateway("elsewhere")
            await asyncio.sleep(1)
            cluster.submit([5] * 20, 10_000, gateway=victim)
            stream = cluster.submit([6] * 20, 300, gateway=cluster.gateways[0])
            await asyncio.sleep(0.3)
            (decode,) = cluster.of_role(DecodeRole)
            assert len(decode.role.sequences()) == 2
            await cluster.kill(victim)
            await asyncio.sleep(0.1)
            assert len(decode.role.sequences()) == 1
            assert not stream.is_over
            assert await output_of(stream) == mock_output([6] * 20, 300)
            await cluster.settle()

    simulate(main())


def test_a_gateway_may_vanish_while_its_handoffs_are_admitted() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_blocks=24)) as cluster:
            victim = cluster.add_gateway("elsewhere")
            await asyncio.sleep(1)
            large = cluster.submit([6] * 200, 120, gateway=cluster.gateways[0])
            await asyncio.sleep(0.1)
            for index in range(3):
                cluster.submit([7 + index] * 170, 10, gateway=victim)
            await asyncio.sleep(0.1)
            (ledger,) = cluster.ledgers()
            assert ledger.num_waiting == 3
            await cluster.kill(victim)
            assert await output_of(large) == mock_output([6] * 200, 120)
            await asyncio.sleep(0.1)
            assert ledger.num_waiting == 0  # seen at the first answer, long before it was silent
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_gateways_requests_leave_nothing_behind(mover: str, seed: int) -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, num_gateways=2, mover=mover)
        async with SimCluster(World(seed), shape) as cluster:
            rng = cluster.world.random
            kept, victim = cluster.gateways

            async def one(token: int) -> None:
                await asyncio.sleep(rng.uniform(0, 0.5))
                prompt = [token] * rng.randrange(1, 200)
                cluster.submit(prompt, 10_000, gateway=victim)
                assert await output_of(cluster.submit(prompt, 30, gateway=kept)) == mock_output(
                    prompt, 30
                )

            serving = asyncio.gather(*(one(5 + index) for index in range(30)))
            await asyncio.sleep(0.55)
            assert victim.dispatcher.stats()["requests_running"] == 30
            await cluster.kill(victim)
            await serving
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("in_order", [True, False])
def test_a_sealed_handoff_whose_prefill_leaves_keeps_its_unfinished_block(in_order: bool) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_prefill=2)) as cluster:
            (decode,) = cluster.of_role(DecodeRole)
            link = cluster.world.network.dealer(decode.seams.pid, STORES[0])
            cluster.world.network.delay(lambda pipe: pipe is link.incoming, 0.5, 0.5)
            stream = cluster.submit([5] * 40, 100)
            (ledger,) = cluster.ledgers()
            await until(
                lambda: [each.state for each in ledger.handoffs.values()] == [HandoffState.SEALED]
            )
            name = stream.timeline.prefill_worker
            (prefill,) = (worker for worker in cluster.workers if worker.config.name == name)
            if in_order:
                await prefill.drain()
                await asyncio.sleep(0.01)  # its goodbye arrives
            await cluster.kill(prefill)
            (handoff,) = ledger.handoffs.values()
            assert handoff.state is HandoffState.SEALED  # decode has not heard of it yet
            assert len(handoff.blocks) == handoff.num_committed + 1
            ledger.check()
            assert await output_of(stream) == mock_output([5] * 40, 100)
            assert stream.timeline.num_attempts == 1
            await cluster.settle()

    simulate(main())


def test_a_store_restarted_on_the_same_data_endpoint_does_not_end_its_workers() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mover="zmq")) as cluster:
            network = cluster.world.network
            refusals: list[str] = []

            def on_failed(pipe: Pipe, message: Failed) -> None:
                if pipe.dealer.endpoint == DATA[0]:
                    refusals.append(message.code)

            listen(network, Failed, on_failed)
            network.delay(lambda pipe: pipe.dealer.endpoint == DATA[0], 0.1, 0.1)
            stream = cluster.submit([5] * 400, 20)
            await asyncio.sleep(0.06)  # blocks are on their way, and will find the new store
            # It knows no worker yet, and hears from them on the data socket first.
            pids = [worker.seams.pid for worker in cluster.workers]
            network.delay(
                lambda pipe: pipe.dealer.endpoint == STORES[0] and pipe.dealer.pid in pids, 0.5, 0.5
            )
            await cluster.restart_store()
            assert await output_of(stream) == mock_output([5] * 400, 20)
            await asyncio.sleep(10)
            assert StaleError.code in refusals
            assert await output_of(cluster.submit([7] * 400, 20)) == mock_output([7] * 400, 20)
            await cluster.settle()

    simulate(main())
