"""Members that are taken for dead and are not, step by step: scenarios for test_zombies.py, and for
the planted bugs that seeds seldom meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import Seal
from kvbaton.errors import KvbatonError
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
from tests.sim.disturbances import Hold
from tests.sim.loop import virtual_loop
from tests.sim.network import Pipe
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
LOST_AFTER_S = 3.0


@asynccontextmanager
async def _stopped(pid: int) -> AsyncIterator[None]:
    """As SIGSTOP, and SIGCONT at the end."""
    virtual_loop().stop_process(pid)
    try:
        yield
    finally:
        if virtual_loop().is_stopped(pid):
            virtual_loop().continue_process(pid)


def a_prefill_worker_wakes_up_and_writes_what_it_began() -> None:
    """Others must not have been given its blocks: it writes at the end of its step, much later."""

    async def main() -> None:
        shape = Shape(num_blocks=24, lost_after_s=LOST_AFTER_S, worker={"mock_step_ms": 200})
        async with SimCluster(World(1), shape) as cluster:
            (zombie,) = cluster.of_role(PrefillRole)
            stream = cluster.submit([5] * (10 * BLOCK), 4)
            await until(lambda: cluster.ledgers()[0].pool.counts()["granted"] >= 10)
            await asyncio.sleep(0.1)
            async with _stopped(zombie.seams.pid):
                await cluster.add_worker("prefill")
                await asyncio.sleep(LOST_AFTER_S + 2 * HEARTBEAT_S)
                # Room for this one only if the blocks of the first were given to it.
                tight = cluster.submit([6] * (18 * BLOCK), 20)
                await asyncio.sleep(0.1)
                assert cluster.ledgers()[0].pool.counts()["quarantined"] > 0
                other = cluster.submit([7] * (9 * BLOCK), 60)
                await asyncio.sleep(1)
            for each, prompt, num in (
                (tight, [6] * (18 * BLOCK), 20),
                (other, [7] * (9 * BLOCK), 60),
            ):
                assert await output_of(each) == mock_output(prompt, num)
            with suppress(KvbatonError):  # it may have been tried too often
                assert await output_of(stream) == mock_output([5] * (10 * BLOCK), 4)
            await cluster.settle()

    simulate(main())


def a_decode_worker_wakes_up_before_its_gateway_has_heard_of_its_loss() -> None:
    """It goes on from blocks it may not use any more, and the gateway would take its tokens."""

    async def main() -> None:
        shape = Shape(num_blocks=24, num_gateways=2, lost_after_s=LOST_AFTER_S)
        async with SimCluster(World(1), shape) as cluster:
            network = cluster.world.network
            near, far = cluster.gateways
            (zombie,) = cluster.of_role(DecodeRole)
            prompt = [5] * (12 * BLOCK)
            stream = cluster.submit(prompt, 150, gateway=far)
            await until(lambda: len(stream.tokens) >= 20)
            # The far gateway is heard, so it is not lost, but hears nothing of the store.
            link = network.dealer(far.seams.pid, STORES[0])
            hold = Hold(lambda pipe: pipe is link.incoming)
            async with _stopped(zombie.seams.pid):
                await cluster.add_worker("decode")
                await asyncio.sleep(LOST_AFTER_S - HEARTBEAT_S - 0.1)
                network.begin(hold)
                await asyncio.sleep(HEARTBEAT_S + 0.2)
                others = [cluster.submit([n] * (4 * BLOCK), 30, gateway=near) for n in range(6, 12)]
                await asyncio.sleep(1)
            await asyncio.sleep(0.1)
            network.end(hold)
            assert await output_of(stream) == mock_output(prompt, 150)
            for number, other in enumerate(others, 6):
                assert await output_of(other) == mock_output([number] * (4 * BLOCK), 30)
            await cluster.settle()

    simulate(main())


def nobody_who_beats_is_lost() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_decode=2, lost_after_s=LOST_AFTER_S)) as cluster:
            members = [worker.stores[0].member_id for worker in cluster.workers]
            await asyncio.sleep(20 * LOST_AFTER_S)
            assert [worker.stores[0].member_id for worker in cluster.workers] == members

    simulate(main())


def a_cancelled_prompt_is_free_within_a_second_though_decode_hears_nothing() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(lost_after_s=30)) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            link = network.dealer(decode.seams.pid, STORES[0])
            hold = Hold(lambda pipe: pipe is link.incoming)
            is_sealed = asyncio.Event()

            def on_seal(_pipe: Pipe, _message: Any) -> None:
                is_sealed.set()

            listen(network, Seal, on_seal)
            stream = cluster.submit([5] * (5 * BLOCK + 1), 40)
            await until(lambda: bool(cluster.ledgers()[0].handoffs))
            network.begin(hold)
            await is_sealed.wait()
            await asyncio.sleep(0.01)
            stream.cancel()
            await asyncio.sleep(1)
            counts = cluster.ledgers()[0].pool.counts()
            assert counts["free"] + counts["cached"] == 512, counts
            network.end(hold)
            await cluster.settle()

    simulate(main())


def a_cancelled_request_holds_nothing_after_a_second() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            stream = cluster.submit([5] * (2 * BLOCK), 1000)
            await until(lambda: len(stream.tokens) >= 20)
            stream.cancel()
            await asyncio.sleep(1)
            counts = cluster.ledgers()[0].pool.counts()
            assert counts["free"] + counts["cached"] == 512, counts
            await cluster.settle()

    simulate(main())


def a_release_that_waits_for_a_push_gives_way_to_an_abort() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mover="zmq", num_gateways=2)) as cluster:
            network = cluster.world.network
            (decode,) = cluster.of_role(DecodeRole)
            data = network.dealer(decode.seams.pid, DATA[0])
            stream = cluster.submit([5] * (2 * BLOCK), 4 * BLOCK, gateway=cluster.gateways[0])
            await until(lambda: len(stream.tokens) >= BLOCK)
            hold = Hold(lambda pipe: pipe is data.outgoing)
            network.begin(hold)
            assert await output_of(stream) == mock_output([5] * (2 * BLOCK), 4 * BLOCK)
            await asyncio.sleep(0.05)
            assert cluster.ledgers()[0].handoffs  # its release waits
            await cluster.kill(cluster.gateways[0])
            await asyncio.sleep(1)
            network.end(hold)
            await cluster.settle()

    simulate(main())


SCENARIOS: list[Callable[[], None]] = [
    a_prefill_worker_wakes_up_and_writes_what_it_began,
    a_decode_worker_wakes_up_before_its_gateway_has_heard_of_its_loss,
    nobody_who_beats_is_lost,
    a_cancelled_prompt_is_free_within_a_second_though_decode_hears_nothing,
    a_cancelled_request_holds_nothing_after_a_second,
    a_release_that_waits_for_a_push_gives_way_to_an_abort,
]
