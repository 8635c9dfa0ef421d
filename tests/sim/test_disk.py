"""The disk tier in a whole cluster: blocks come back from it, over restarts, and from a bad disk
nothing comes but slowness."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.worker.mover import ZmqMover
from tests.sim.cluster import HEARTBEAT_S, Shape, SimCluster, output_of, simulate
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
SHAPE = Shape(num_blocks=128, disk_bytes=2000 * MOCK_LAYOUT.block_bytes)


def prompt(number: int, num_blocks: int = 20) -> list[int]:
    return [number] * (num_blocks * BLOCK) + [1]


async def serve(cluster: SimCluster, tokens: list[int]) -> int:
    """Serve one request. Returns how many tokens of it were cached."""
    stream = cluster.submit(tokens, 3)
    assert await output_of(stream) == mock_output(tokens, 3)
    return stream.num_cached_tokens


async def fill(cluster: SimCluster, numbers: range) -> None:
    """More prompts than memory holds, one after another."""
    for number in numbers:
        assert await serve(cluster, prompt(number)) == 0


def test_evicted_blocks_come_back_from_the_disk() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            (ledger,) = cluster.ledgers()
            assert ledger.pool.num_evicted > 300
            for number in range(5, 35):
                assert await serve(cluster, prompt(number)) == 20 * BLOCK
            await cluster.settle()

    simulate(main())


def test_the_disk_tier_survives_a_restart_of_the_store() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            await cluster.crash_store(0, down_s=1)
            await asyncio.sleep(10 * HEARTBEAT_S)
            num_cached = [await serve(cluster, prompt(number)) for number in range(5, 25)]
            assert num_cached == [20 * BLOCK] * 20
            await cluster.settle()

    simulate(main())


def test_others_with_the_same_beginning_wait_for_one_load() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            (store,) = cluster.stores
            assert store.news.counters()["disk_blocks_loaded"] == 0
            streams = [cluster.submit(prompt(5), 3) for _ in range(6)]
            for stream in streams:
                assert await output_of(stream) == mock_output(prompt(5), 3)
                assert stream.num_cached_tokens == 20 * BLOCK
            assert 0 < store.news.counters()["disk_blocks_loaded"] <= 20
            await cluster.settle()

    simulate(main())


def test_what_is_sooner_computed_is_not_loaded() -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            (store,) = cluster.stores
            world.drive.bytes_per_s = 50 * MOCK_LAYOUT.block_bytes  # 800 tokens a second
            first = await serve(cluster, prompt(5))  # tried once: its speed is not known
            assert first > 0
            num_loaded = store.news.counters()["disk_blocks_loaded"]
            assert num_loaded > 0
            assert await serve(cluster, prompt(6)) < 20 * BLOCK
            assert store.news.counters()["disk_blocks_loaded"] == num_loaded
            await cluster.settle()

    simulate(main())


def test_a_request_that_is_cancelled_while_its_blocks_are_loaded_leaves_nothing() -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            world.drive.on.add("slow")
            stream = cluster.submit(prompt(5), 3)
            await asyncio.sleep(0.005)
            (ledger,) = cluster.ledgers()
            assert ledger.num_waiting == 1
            assert ledger.pool.counts()["granted"] > 0
            stream.cancel()
            await cluster.settle()
            assert world.drive.struck["slow"] > 0

    simulate(main())


@pytest.mark.parametrize(
    "fault", ["slow", "full", "write_error", "read_error", "torn", "lost", "flipped"]
)
def test_from_a_bad_disk_nothing_comes_but_slowness(fault: str) -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, SHAPE) as cluster:
            await fill(cluster, range(5, 20))
            world.drive.on.add(fault)
            await fill(cluster, range(20, 35))
            for number in range(5, 35):
                await serve(cluster, prompt(number))
            assert world.drive.struck[fault] > 0
            stats = cluster.stores[0].news.counters()
            if fault in ("full", "write_error", "torn"):
                assert stats["disk_write_errors"] > 0
                assert stats["disk_is_failing"]
            if fault == "flipped":
                assert stats["disk_blocks_corrupt"] > 0
            world.drive.on.clear()
            await cluster.settle()
            await fill(cluster, range(40, 60))
            assert not cluster.stores[0].news.counters()["disk_is_failing"]
            await cluster.settle()

    simulate(main())


def test_a_disk_with_less_room_than_memory_is_not_written_for_ever() -> None:
    async def main() -> None:
        shape = Shape(num_blocks=48, disk_bytes=60 * MOCK_LAYOUT.block_bytes)
        async with SimCluster(World(1), shape) as cluster:
            await fill(cluster, range(5, 15))
            await asyncio.sleep(HEARTBEAT_S)
            num_written = cluster.stores[0].news.counters()["disk_blocks_written"]
            assert num_written > 0
            await asyncio.sleep(30 * HEARTBEAT_S)
            assert cluster.stores[0].news.counters()["disk_blocks_written"] == num_written

    simulate(main())


@pytest.mark.parametrize("num_others", [3, 30], ids=["in memory", "evicted"])
def test_bytes_that_changed_in_memory_reach_neither_the_disk_nor_a_worker(num_others: int) -> None:
    async def main() -> None:
        shape = dataclasses.replace(SHAPE, mover="zmq", num_prefill=2, num_decode=2)
        async with SimCluster(World(1), shape) as cluster:
            (store,), (ledger,) = cluster.stores, cluster.ledgers()
            await serve(cluster, prompt(5))
            await asyncio.sleep(0.5)
            block = next(block for block in range(128) if ledger.pool[block].name)
            store._memory.arena[block * MOCK_LAYOUT.block_bytes + 7] ^= 0xFF
            await fill(cluster, range(6, 6 + num_others))
            for worker in cluster.workers:  # as if it had been started again: it has no copies
                mover = worker.stores[0].mover
                assert isinstance(mover, ZmqMover)
                mover._held.clear()
            assert await serve(cluster, prompt(5)) < 20 * BLOCK
            assert store.num_corrupt >= 1
            await cluster.settle()

    simulate(main())


def test_a_block_is_loaded_once_for_a_prompt_though_memory_is_too_small_for_all() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            large = prompt(5, 100)
            await serve(cluster, large)
            await fill(cluster, range(6, 12))
            running = cluster.submit(prompt(60, 40), 400)
            await asyncio.sleep(0.3)
            streams = [cluster.submit(large, 3), *(cluster.submit(prompt(n), 3) for n in (6, 7))]
            for stream, tokens in zip(streams, (large, prompt(6), prompt(7)), strict=True):
                assert await output_of(stream) == mock_output(tokens, 3)
            assert await output_of(running) == mock_output(prompt(60, 40), 400)
            assert cluster.stores[0].news.counters()["disk_blocks_loaded"] <= 100 + 2 * 20
            await cluster.settle()

    simulate(main())


def test_a_disk_that_hangs_holds_up_nobody_for_long_and_says_so() -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, SHAPE) as cluster:
            await fill(cluster, range(5, 35))
            world.drive.latency_s = 200.0
            now = asyncio.get_running_loop().time
            began_at = now()
            for number in (5, 6, 7):
                await serve(cluster, prompt(number))
            assert now() - began_at < 10
            assert cluster.stores[0].news.counters()["disk_is_failing"]
            world.drive.latency_s = 1e-4
            await asyncio.sleep(900)
            assert not cluster.stores[0].news.counters()["disk_is_failing"]
            await cluster.settle()

    simulate(main(), limit_s=2000)
