"""Links between gateways, workers and the store that break, or bring messages too late."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.messages import GetBlocks, OpenHandoff, Reserve, Welcome
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import (
    DATA,
    HEARTBEAT_S,
    STORES,
    Shape,
    SimCluster,
    listen,
    output_of,
    simulate,
    until,
)
from tests.sim.disturbances import Lose
from tests.sim.network import Pipe
from tests.sim.stranger import STRANGER_ID, Stranger
from tests.sim.world import World


def test_a_reserve_for_a_former_incarnation_holds_no_place() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            endpoint = network.router_of(decode.seams.pid).endpoint
            link = network.dealer(cluster.gateways[0].seams.pid, endpoint)
            network.delay(lambda pipe: pipe is link.outgoing, 3, 3)
            reserved_for: list[str] = []
            listen(network, Reserve, lambda _pipe, m: reserved_for.append(m.handoff_id))
            stream = cluster.submit([5] * 20, 50)
            await asyncio.sleep(0.05)
            control = network.dealer(cluster.gateways[0].seams.pid, STORES[0])
            network.delay(lambda pipe: pipe is control.incoming, 5, 5)  # it hears of it late
            former_id = decode.stores[0].member_id
            network.break_link(network.dealer(decode.seams.pid, STORES[0]))
            await until(lambda: decode.stores[0].member_id != former_id)
            assert reserved_for == []  # it comes when the worker is another member
            await until(lambda: reserved_for != [])
            await until(lambda: stream.is_over)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
def test_a_broken_connection_of_gateway_and_worker_loses_no_request(
    role: type[PrefillRole | DecodeRole],
) -> None:
    """Prefill: its first token finds nobody. Decode: the reserve on its way is lost."""

    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            network = cluster.world.network
            (worker,) = cluster.of_role(role)
            endpoint = network.router_of(worker.seams.pid).endpoint
            link = network.dealer(cluster.gateways[0].seams.pid, endpoint)
            if role is DecodeRole:
                network.delay(lambda pipe: pipe is link.outgoing, 0.05, 0.05)
            stream = cluster.submit([5] * 1500, 20)
            await asyncio.sleep(0.03)
            network.break_link(link)
            assert await output_of(stream) == mock_output([5] * 1500, 20)
            assert role is PrefillRole or network.num_lost > 0
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("how", ["full", "lost", "broken"])
def test_blocks_that_never_come_are_soon_asked_for_again(how: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mover="zmq")) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            link = network.dealer(decode.seams.pid, DATA[0])
            lose = Lose(lambda pipe: pipe is link.incoming)
            asked: list[int] = []

            def on_ask(pipe: Pipe, _message: GetBlocks) -> None:
                if pipe is link.outgoing and not asked:
                    asked.append(1)
                    if how == "full":
                        link.incoming.is_full = True
                    elif how == "lost":
                        network.begin(lose)
                    else:
                        network.break_link(link)

            listen(network, GetBlocks, on_ask)
            stream = cluster.submit([5] * 100, 20)
            await until(lambda: asked != [])
            await asyncio.sleep(0.1)
            link.incoming.is_full = False
            if how == "lost":
                network.end(lose)
            async with asyncio.timeout(4 * HEARTBEAT_S):
                assert await output_of(stream) == mock_output([5] * 100, 20)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("is_new", [True, False])
def test_a_worker_outlives_a_store_that_ends_when_it_has_just_welcomed_it(is_new: bool) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            store_ends = asyncio.Event()

            def on_welcome(_pipe: Pipe, message: Welcome) -> None:
                if message.arena_path and not store_ends.is_set():
                    cluster.world.network.kill(cluster.pid_at(STORES[0]))
                    cluster.world.disk.remove_arena(message.arena_path)
                    store_ends.set()

            listen(cluster.world.network, Welcome, on_welcome)
            stream = cluster.submit([5] * 100, 200)
            await until(lambda: len(stream.tokens) > 20)
            if is_new:
                await cluster.add_worker("decode")
            else:
                await cluster.restart_store()
            await store_ends.wait()
            await cluster.crash_store(0, 3 * HEARTBEAT_S)
            assert await output_of(stream) == mock_output([5] * 100, 200)
            await asyncio.sleep(2 * HEARTBEAT_S)
            assert all(store.welcome.arena_path for w in cluster.workers for store in w.stores)
            assert await output_of(cluster.submit([6] * 100, 9)) == mock_output([6] * 100, 9)
            await cluster.settle()

    simulate(main())


def test_a_handoff_is_opened_for_a_prefill_and_a_decode_worker_only() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            stranger = Stranger(cluster, STORES[0])
            assert await stranger.hello("gateway") == "Welcome"
            prefill, decode = (worker.stores[0].member_id for worker in cluster.workers)
            for prefill_id, decode_id in (
                (decode, prefill),
                (prefill, STRANGER_ID),
                (STRANGER_ID, decode),
            ):
                request = OpenHandoff(
                    request_id="r",
                    prefill_id=prefill_id,
                    decode_id=decode_id,
                    tenant=b"t",
                    root_key=b"",
                    keys=[],
                    num_tokens=20,
                )
                assert await stranger.ask(request) not in ("HandoffOpened", "")

    simulate(main())
