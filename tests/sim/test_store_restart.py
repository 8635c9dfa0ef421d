"""A store that was killed is followed by one that finds its blocks, and holds back those that
workers of the dead store may be using."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.worker.runtime import WorkerRuntime
from services.decode.worker import DecodeRole
from services.kvstore.blocks import BlockState
from services.kvstore.ledger import Ledger
from services.prefill.worker import PrefillRole
from tests.sim.cluster import HEARTBEAT_S, Shape, SimCluster, output_of, simulate, until
from tests.sim.loop import virtual_loop
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
DOWN_S = 0.3
SHAPES = {
    "shm": Shape(),
    "zmq": Shape(mover="zmq"),
    "colocated": Shape(num_prefill=0, num_decode=2, mode="colocated"),
    "two stores": Shape(num_stores=2),
    "disk": Shape(disk_bytes=400 * MOCK_LAYOUT.block_bytes),
}


def prompt(number: int, num_blocks: int = 10) -> list[int]:
    return [number] * (num_blocks * BLOCK) + [1]


async def serve(cluster: SimCluster, tokens: list[int], num_tokens: int = 5) -> int:
    """Serve one request. Returns how many of its tokens were cached."""
    stream = cluster.submit(tokens, num_tokens)
    assert await output_of(stream) == mock_output(tokens, num_tokens)
    return stream.num_cached_tokens


def num_computed(cluster: SimCluster) -> int:
    """Tokens that all workers have computed."""
    return sum(worker._steps.num_tokens_computed for worker in cluster.workers if worker._steps)


async def crash(cluster: SimCluster) -> Ledger:
    """Kill store 0, and see it replaced. Returns the ledger of the new one."""
    await cluster.crash_store(0, DOWN_S)
    store = cluster.stores[0]
    await until(lambda: store.serving is not None)
    assert store.serving is not None
    return store.serving.ledger


@contextmanager
def stopped(worker: WorkerRuntime) -> Iterator[None]:
    """As SIGSTOP, and SIGCONT at the end."""
    virtual_loop().stop_process(worker.seams.pid)
    try:
        yield
    finally:
        virtual_loop().continue_process(worker.seams.pid)


@pytest.mark.parametrize("name", SHAPES)
def test_what_was_cached_is_found_after_a_crash(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES[name]) as cluster:
            numbers = range(5, 15)
            assert [await serve(cluster, prompt(number)) for number in numbers] == [0] * 10
            num_final = cluster.ledgers()[0].pool.num_indexed
            assert num_final > 0
            ledger = await crash(cluster)
            await asyncio.sleep(2 * HEARTBEAT_S)
            counts = ledger.pool.counts()
            assert (counts["cached"], counts["quarantined"]) == (num_final, 0)
            assert [await serve(cluster, prompt(number)) for number in numbers] == [10 * BLOCK] * 10
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", ["shm", "zmq", "colocated"])
def test_what_ran_goes_on_and_computes_little_anew(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(2), SHAPES[name]) as cluster:
            streams = [cluster.submit(prompt(number), 80) for number in range(5, 9)]
            await until(lambda: all(len(stream.tokens) > 20 for stream in streams))
            await crash(cluster)
            for number, stream in enumerate(streams, 5):
                assert await output_of(stream) == mock_output(prompt(number), 80)
            assert any(stream.timeline.num_attempts > 1 for stream in streams)
            await cluster.settle()
            num_needed = len(streams) * (len(prompt(5)) + 80)
            assert num_computed(cluster) < num_needed + len(streams) * 2 * BLOCK

    simulate(main())


def test_an_orderly_end_leaves_nothing() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            await serve(cluster, prompt(5))
            await cluster.restart_store()
            await asyncio.sleep(10 * HEARTBEAT_S)
            assert await serve(cluster, prompt(5)) == 0

    simulate(main())


def test_the_order_of_eviction_is_that_of_the_last_uses() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_blocks=64)) as cluster:
            for number in (5, 6, 7, 8, 5):
                await serve(cluster, prompt(number))
            await crash(cluster)
            await asyncio.sleep(2 * HEARTBEAT_S)
            # Room for this one is made by those that were used first: 6, not 5.
            assert await serve(cluster, prompt(9, 25)) == 0
            assert await serve(cluster, prompt(5)) == 10 * BLOCK
            assert await serve(cluster, prompt(6)) < 10 * BLOCK
            await cluster.settle()

    simulate(main())


def test_what_a_worker_may_be_writing_is_nobody_elses_until_it_has_stopped() -> None:
    async def main() -> None:
        shape = Shape(num_blocks=24, num_prefill=2, worker={"mock_step_ms": 200})
        async with SimCluster(World(1), shape) as cluster:
            stream = cluster.submit(prompt(5), 4)
            (ledger,) = cluster.ledgers()
            await until(lambda: ledger.pool.counts()["granted"] >= 11)
            await asyncio.sleep(0.1)
            (zombie,) = (each for each in cluster.of_role(PrefillRole) if each.role.sequences())
            (handoff,) = ledger.handoffs.values()
            written = handoff.blocks[handoff.num_committed :]
            with stopped(zombie):
                for _ in range(2):  # also if the next store dies
                    ledger = await crash(cluster)
                    await asyncio.sleep(3 * HEARTBEAT_S)
                    states = {ledger.pool[block].state for block in written}
                    assert states == {BlockState.QUARANTINED}
                others = [cluster.submit(prompt(number, 5), 20) for number in range(6, 9)]
                for number, other in enumerate(others, 6):
                    assert await output_of(other) == mock_output(prompt(number, 5), 20)
                assert ledger.pool.counts()["quarantined"] >= len(written)
            assert await output_of(stream) == mock_output(prompt(5), 4)
            await cluster.settle()

    simulate(main())


def test_what_a_worker_may_be_reading_is_kept_until_it_has_stopped() -> None:
    """It wakes up, and its gateway takes the token that it makes of what it reads then."""

    async def main() -> None:
        async with SimCluster(World(1), Shape(num_blocks=40, num_decode=2)) as cluster:
            stream = cluster.submit(prompt(5), 100)
            await until(lambda: len(stream.tokens) > 5)
            (zombie,) = (each for each in cluster.of_role(DecodeRole) if each.role.sequences())
            (sequence,) = zombie.role.sequences()
            blocks = list(sequence.blocks[:10])
            memory = cluster.stores[0]._memory
            num_tokens = len(stream.tokens)
            with stopped(zombie):
                before = [bytes(memory.arena[b * MOCK_LAYOUT.block_bytes :][:64]) for b in blocks]
                ledger = await crash(cluster)
                await asyncio.sleep(HEARTBEAT_S)
                others = [cluster.submit(prompt(number, 8), 20) for number in range(6, 12)]
                for number, other in enumerate(others, 6):
                    assert await output_of(other) == mock_output(prompt(number, 8), 20)
                assert ledger.pool.num_evicted > 0
                arena = cluster.stores[0]._memory.arena
                assert [bytes(arena[b * MOCK_LAYOUT.block_bytes :][:64]) for b in blocks] == before
                assert set(blocks) <= set(ledger.staging.former)
                assert len(stream.tokens) == num_tokens
            assert await output_of(stream) == mock_output(prompt(5), 100)
            assert ledger.staging.former == []
            await cluster.settle()

    simulate(main())


def test_nothing_is_held_back_for_workers_that_died_meanwhile() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(worker={"mock_step_ms": 200})) as cluster:
            stream = cluster.submit(prompt(5), 4)
            await until(lambda: cluster.ledgers()[0].pool.counts()["granted"] >= 11)
            restart = asyncio.ensure_future(cluster.crash_store(0, DOWN_S))
            await asyncio.sleep(DOWN_S / 2)
            for worker in list(cluster.workers):
                await cluster.kill(worker)
            await restart
            await cluster.add_worker("prefill")
            await cluster.add_worker("decode")
            await asyncio.sleep(0.1)
            counts = cluster.ledgers()[0].pool.counts()
            assert counts["quarantined"] == counts["committed"] == 0
            assert await output_of(stream) == mock_output(prompt(5), 4)
            await cluster.settle()

    simulate(main())
