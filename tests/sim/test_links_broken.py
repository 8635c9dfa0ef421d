"""Links between gateways, workers and the store that break, or bring messages too late."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.messages import OpenHandoff, Reserve
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import STORES, Shape, SimCluster, listen, output_of, simulate, until
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
