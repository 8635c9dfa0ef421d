"""Several stores: prompts are spread over them, and a lost one takes only its cache with it."""

from __future__ import annotations

import asyncio

from common.engine.mock import mock_output
from services.gateway.routing.placement import choose_shard
from tests.sim.cluster import HEARTBEAT_S, Shape, SimCluster, output_of, simulate, until
from tests.sim.world import World


def test_only_the_prompts_of_a_lost_shard_go_elsewhere() -> None:
    blocks = [[number] * 16 for number in range(300)]
    before = [choose_shard(block, [0, 1, 2]) for block in blocks]
    after = [choose_shard(block, [0, 2]) for block in blocks]
    assert {before.count(shard) > 50 for shard in (0, 1, 2)} == {True}
    moved = [shard for shard, now in zip(before, after, strict=True) if shard != now]
    assert moved == [1] * before.count(1)


def test_prompts_that_begin_alike_meet_at_one_shard_and_find_their_blocks() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_stores=2)) as cluster:
            for number in range(8):
                shared = [number + 5] * 40
                for rest in ([1, 2, 3], [4] * 20):
                    stream = cluster.submit(shared + rest, 4)
                    assert await output_of(stream) == mock_output(shared + rest, 4)
                assert stream.num_cached_tokens == 32
            used = [ledger.pool.counts()["cached"] for ledger in cluster.ledgers()]
            assert all(used)
            await cluster.settle()

    simulate(main())


def test_a_lost_shard_takes_its_cache_and_no_request_with_it() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_stores=2, num_decode=2)) as cluster:
            prompts = [[number + 5] * 40 for number in range(12)]
            running = [cluster.submit(prompt, 150) for prompt in prompts]
            await until(lambda: all(len(stream.tokens) > 3 for stream in running))
            assert cluster.ledgers()[0].handoffs
            crash = asyncio.ensure_future(cluster.crash_store(0, down_s=60))
            for stream, prompt in zip(running, prompts, strict=True):
                assert await output_of(stream) == mock_output(prompt, 150)
            assert any(stream.timeline.num_attempts > 1 for stream in running)
            # A worker that starts now does not wait for the shard that is gone.
            await cluster.kill(cluster.workers[0])
            await cluster.add_worker("prefill")
            await asyncio.sleep(2 * HEARTBEAT_S)
            for prompt in prompts:
                assert await output_of(cluster.submit(prompt, 5)) == mock_output(prompt, 5)
            assert not crash.done()
            await crash
            await asyncio.sleep(10 * HEARTBEAT_S)
            for prompt in prompts:
                assert await output_of(cluster.submit(prompt, 5)) == mock_output(prompt, 5)
            assert all(ledger.pool.counts()["cached"] for ledger in cluster.ledgers())
            await cluster.settle()

    simulate(main())
