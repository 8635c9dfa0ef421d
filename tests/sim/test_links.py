"""Connections that are slow, full or broken at a bad moment, in the simulated cluster."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.messages import (
    Aborted,
    BlockBytes,
    Claim,
    GetBlocks,
    Reserve,
    Welcome,
)
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import DATA, STORES, Shape, SimCluster, listen, output_of, simulate, until
from tests.sim.network import USUAL_DELAY_S, Pipe
from tests.sim.test_cluster_in_memory import serve_at_random
from tests.sim.world import World


def test_a_reserve_that_arrives_after_its_abort_holds_no_place() -> None:
    async def main() -> None:
        num_places = 4
        shape = Shape(worker={"max_num_seqs": num_places})
        async with SimCluster(World(1), shape) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            endpoint = network.router_of(decode.seams.pid).endpoint
            link = network.dealer(cluster.gateways[0].seams.pid, endpoint)
            network.delay(lambda pipe: pipe is link.outgoing, 0.05, 0.05)
            aborted: set[str] = set()
            num_late = 0

            def on_aborted(pipe: Pipe, message: Aborted) -> None:
                if pipe.dealer.pid == decode.seams.pid:
                    aborted.add(message.handoff_id)

            def on_reserve(_pipe: Pipe, message: Reserve) -> None:
                nonlocal num_late
                num_late += message.handoff_id in aborted

            listen(network, Aborted, on_aborted)
            listen(network, Reserve, on_reserve)
            for _ in range(num_places):
                stream = cluster.submit([5] * 20, 50)
                await asyncio.sleep(0.02)
                stream.cancel()
            await cluster.settle()
            assert num_late == num_places
            assert await output_of(cluster.submit([7] * 20, 5)) == mock_output([7] * 20, 5)

    simulate(main())


def test_a_late_pull_never_overwrites_another_sequences_block() -> None:
    async def main() -> None:
        shape = Shape(num_blocks=12, mover="zmq")
        async with SimCluster(World(1), shape) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            (ledger,) = cluster.ledgers()
            data = network.dealer(decode.seams.pid, DATA[0])
            network.delay(lambda pipe: pipe is data.incoming, 0.7, 0.7)
            running = cluster.submit([5] * 20, 160)
            await until(lambda: len(running.tokens) >= 10)
            pulled: set[int] = set()
            arrived: list[bool] = []  # for each late pull: whether a sequence had its blocks

            def on_get(pipe: Pipe, message: GetBlocks) -> None:
                if pipe.dealer is data:
                    blocks = ledger.handoffs[message.handoff_id].blocks
                    pulled.update(blocks[index] for index in message.indexes)
                    stream.cancel()

            def on_bytes(pipe: Pipe, _message: BlockBytes) -> None:
                if pipe.dealer is data:
                    live = [each for each in decode.role.sequences() if not each.is_over]
                    arrived.append(any(not pulled.isdisjoint(each.blocks) for each in live))

            listen(network, GetBlocks, on_get)
            listen(network, BlockBytes, on_bytes)
            stream = cluster.submit([6] * 110, 50)
            assert await output_of(running) == mock_output([5] * 20, 160)
            assert arrived == [True]
            await cluster.settle()

    simulate(main())


def test_a_slow_answer_to_a_claim_leaks_nothing() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            link = network.dealer(decode.seams.pid, STORES[0])
            claimed_at: list[float] = []

            def on_claim(_pipe: Pipe, _message: Claim) -> None:
                claimed_at.append(asyncio.get_running_loop().time())
                network.delay(lambda pipe: pipe is link.incoming, 70, 70)
                asyncio.get_running_loop().call_later(
                    0.001, network.delay, lambda pipe: pipe is link.incoming, *USUAL_DELAY_S
                )

            listen(network, Claim, on_claim)
            stream = cluster.submit([5] * 20, 30)
            assert await output_of(stream) == mock_output([5] * 20, 30)
            assert len(claimed_at) == 1
            assert asyncio.get_running_loop().time() - claimed_at[0] > 70
            await cluster.settle()

    simulate(main())


def test_a_first_call_right_after_hello_is_not_failed_by_the_welcome() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            await cluster.kill(cluster.of_role(DecodeRole)[0])
            await asyncio.sleep(1)
            network, (gateway,) = cluster.world.network, cluster.gateways
            order: list[str] = []

            def on_reserve(_pipe: Pipe, _message: Reserve) -> None:
                order.append("reserve")

            def on_welcome(pipe: Pipe, _message: Welcome) -> None:
                if pipe.dealer.pid == gateway.seams.pid:
                    order.append("welcome")

            listen(network, Reserve, on_reserve)
            listen(network, Welcome, on_welcome)
            network.delay(
                lambda pipe: (
                    pipe.dealer.pid == gateway.seams.pid
                    and pipe.dealer.endpoint not in STORES
                    and not pipe.to_router
                ),
                0.03,
                0.03,
            )
            await cluster.add_worker("decode")
            await until(lambda: gateway.dispatcher.ready)
            stream = cluster.submit([5] * 20, 5)
            assert await output_of(stream) == mock_output([5] * 20, 5)
            assert order == ["reserve", "welcome"]
            assert stream.timeline.num_attempts == 1
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
def test_a_broken_control_connection_leaks_nothing(mover: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_decode=2, mover=mover)) as cluster:
            network = cluster.world.network
            stream = cluster.submit([5] * 100, 1000)
            await asyncio.sleep(0.3)
            (decode,) = (each for each in cluster.of_role(DecodeRole) if each.role.sequences())
            former_id = decode.stores[0].member_id
            # The worker comes back before the store notices by itself that it was gone.
            gateway = network.dealer(cluster.gateways[0].seams.pid, STORES[0])
            network.delay(lambda pipe: pipe is gateway.outgoing, 0.5, 0.5)
            link = network.dealer(decode.seams.pid, STORES[0])
            network.delay(lambda pipe: pipe.dealer is link, 0.05, 0.05)
            await asyncio.sleep(0.1)
            network.break_link(link)
            assert await output_of(stream) == mock_output([5] * 100, 1000)
            assert stream.timeline.num_attempts == 2
            assert decode.stores[0].member_id != former_id
            assert network.num_lost > 0
            await cluster.settle()
            assert len(cluster.gateways[0].dispatcher.fleet.workers) == 3

    simulate(main())


@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
def test_a_worker_that_takes_no_more_for_a_while_loses_no_request(
    role: type[PrefillRole | DecodeRole],
) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_prefill=2, num_decode=2)) as cluster:
            network = cluster.world.network
            worker = cluster.of_role(role)[0]
            former_id = worker.stores[0].member_id
            serving = asyncio.ensure_future(serve_at_random(cluster, 40))
            await asyncio.sleep(0.5)
            pipe = network.dealer(worker.seams.pid, STORES[0]).incoming
            pipe.is_full = True
            await until(lambda: network.num_refused > 0)
            await asyncio.sleep(0.1)
            pipe.is_full = False
            await serving
            await cluster.settle()
            assert worker.stores[0].member_id != former_id  # it was forgotten, and came back

    simulate(main())
