"""The whole cluster in one thread on virtual time: the services' own code, over simulated seams.

The mock engine's tokens are a function of the KV it reads, so every wrong, stale or missing block
shows as a wrong token.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from kvbaton.errors import (
    DeadlineError,
    InvalidRequestError,
    TooLargeError,
    UnavailableError,
)
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import HEARTBEAT_S, Shape, SimCluster, output_of, simulate, until
from tests.sim.world import World

SHAPES = {
    "shm": Shape(num_prefill=2, num_decode=2),
    "zmq": Shape(num_prefill=2, num_decode=2, mover="zmq"),
    "colocated": Shape(num_prefill=0, num_decode=2, mode="colocated"),
    "colocated_zmq": Shape(num_prefill=0, num_decode=2, mode="colocated", mover="zmq"),
    "two_stores": Shape(num_prefill=2, num_decode=2, num_stores=2),
    "two_stores_zmq": Shape(num_prefill=2, num_decode=2, num_stores=2, mover="zmq"),
    "two_gateways": Shape(num_prefill=2, num_decode=2, num_gateways=2),
    "two_gateways_zmq": Shape(num_prefill=2, num_decode=2, num_gateways=2, mover="zmq"),
}


def random_prompt(rng: random.Random, most: int = 300) -> list[int]:
    """Some prompts begin alike, so that prefixes are shared."""
    common = [rng.randrange(5, 2000)] * rng.choice([0, 0, 33, 64])
    return common + [rng.randrange(5, 2000) for _ in range(rng.randrange(1, most))]


async def serve_at_random(cluster: SimCluster, num_requests: int, most: int = 40) -> float:
    """Requests at random times, each checked; returns when the last was done."""
    rng = cluster.world.random

    async def one() -> None:
        await asyncio.sleep(rng.uniform(0, 1))
        prompt, num_tokens = random_prompt(rng), rng.randrange(1, most)
        stream = cluster.submit(prompt, num_tokens)
        assert await output_of(stream) == mock_output(prompt, num_tokens)

    await asyncio.gather(*(one() for _ in range(num_requests)))
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_own_tokens(name: str, seed: int) -> None:
    async def main() -> None:
        async with SimCluster(World(seed), SHAPES[name]) as cluster:
            await serve_at_random(cluster, 40)
            await cluster.settle()
            if SHAPES[name].mover == "auto":
                movers = [store.mover for worker in cluster.workers for store in worker.stores]
                assert sum(mover.num_bytes_moved for mover in movers) == 0

    simulate(main())


def test_a_seed_gives_the_same_run_twice() -> None:
    async def main() -> tuple[float, int]:
        async with SimCluster(World(7), SHAPES["shm"]) as cluster:
            ended_at = await serve_at_random(cluster, 20)
            return ended_at, cluster.world.network.num_messages

    assert simulate(main()) == simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_when_blocks_run_out_sequences_give_way_and_lose_no_token(mode: str, mover: str) -> None:
    shape = Shape(
        num_prefill=1, num_decode=2, num_blocks=24, mode=mode, mover=mover,
        worker={"max_num_seqs": 8},
    )  # fmt: skip

    async def main() -> int:
        async with SimCluster(World(3), shape) as cluster:
            rng = cluster.world.random

            async def one() -> None:
                prompt, num_tokens = random_prompt(rng, 60), rng.randrange(60, 120)
                stream = cluster.submit(prompt, num_tokens)
                assert await output_of(stream) == mock_output(prompt, num_tokens)

            await asyncio.gather(*(one() for _ in range(12)))
            await cluster.settle()
            return sum(each.counts().num_preemptions for each in cluster.of_role(DecodeRole))

    assert simulate(main()) > 0


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_more_sequences_than_places_finish_also_when_blocks_run_out(mode: str) -> None:
    async def main() -> None:
        # Two sequences need 24 blocks, and those that wait for a place hold most of the others.
        shape = Shape(num_blocks=16, mode=mode, worker={"max_num_seqs": 2})
        async with SimCluster(World(1), shape) as cluster:
            prompts = [[5 + index] * 30 for index in range(12)]
            streams = [cluster.submit(prompt, 150) for prompt in prompts]
            outputs = await asyncio.gather(*(output_of(stream) for stream in streams))
            assert outputs == [mock_output(prompt, 150) for prompt in prompts]
            (decode,) = cluster.of_role(DecodeRole)
            assert decode.counts().num_preemptions > 0
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_a_cancel_at_any_moment_leaves_nothing_behind(name: str, seed: int) -> None:
    async def main() -> None:
        async with SimCluster(World(seed), SHAPES[name]) as cluster:
            rng = cluster.world.random

            async def one(index: int) -> None:
                prompt = random_prompt(rng)
                if index % 3 == 0:
                    assert await output_of(cluster.submit(prompt, 20)) == mock_output(prompt, 20)
                else:
                    stream = cluster.submit(prompt, 10_000)  # it cannot end by itself
                    await asyncio.sleep(rng.uniform(0, 0.3))
                    stream.cancel()

            await asyncio.gather(*(one(index) for index in range(40)))
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
@pytest.mark.parametrize("num_gateways", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_workers_requests_are_served_by_another(
    role: type[PrefillRole | DecodeRole], mover: str, num_gateways: int, seed: int
) -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, num_gateways=num_gateways, mover=mover)
        async with SimCluster(World(seed), shape) as cluster:
            serving = asyncio.ensure_future(serve_at_random(cluster, 40))
            await asyncio.sleep(cluster.world.random.uniform(0.2, 0.6))
            victim = cluster.of_role(role)[0]
            await until(lambda: victim.role.sequences() != [])  # the fault must hit something
            await cluster.kill(victim)
            await serving
            await cluster.settle()

    simulate(main())


def test_workers_join_and_leave_a_running_cluster() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            first = list(cluster.workers)
            await cluster.add_worker("prefill")
            await cluster.add_worker("decode")
            serving = asyncio.ensure_future(serve_at_random(cluster, 40))
            await asyncio.sleep(0.4)
            for worker in first:
                await worker.drain()
                await cluster.kill(worker)
            await serving
            assert all(worker.role.load() is not None for worker in cluster.workers)
            assert len(cluster.gateways[0].dispatcher.fleet.workers) == 2
            await cluster.settle()

    simulate(main())


def test_without_a_worker_of_a_role_requests_wait_a_moment_and_are_then_refused_at_once() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            await cluster.kill(cluster.of_role(PrefillRole)[0])
            await asyncio.sleep(HEARTBEAT_S)
            stream = cluster.submit([5, 6, 7], 3)  # it may only be restarting
            with pytest.raises(UnavailableError, match="no prefill worker"):
                await output_of(stream)
            with pytest.raises(UnavailableError, match="no prefill worker") as refused:
                cluster.submit([5, 6, 7], 3)
            assert refused.value.retry_after_s == 1
            await cluster.add_worker("prefill")
            await asyncio.sleep(HEARTBEAT_S)
            assert await output_of(cluster.submit([5, 6, 7], 3)) == mock_output([5, 6, 7], 3)

    simulate(main())


def test_a_request_that_comes_while_a_worker_restarts_is_served_when_it_is_back() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            await cluster.kill(cluster.of_role(PrefillRole)[0])
            await asyncio.sleep(HEARTBEAT_S)
            stream = cluster.submit([5, 6, 7], 3)
            await asyncio.sleep(1)
            await cluster.add_worker("prefill")
            assert await output_of(stream) == mock_output([5, 6, 7], 3)
            await cluster.settle()

    simulate(main())


def test_a_deadline_ends_a_request_and_frees_what_it_holds() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            stream = cluster.submit([5] * 50, 10_000, deadline_s=0.5)
            started_at = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineError, match=r"0\.5 s"):
                await output_of(stream)
            assert asyncio.get_running_loop().time() - started_at == pytest.approx(0.5)
            assert len(stream.tokens) > 10
            await cluster.settle()

    simulate(main())


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_blocks=8)) as cluster:
            with pytest.raises(InvalidRequestError, match="needs 9 KV blocks"):
                await output_of(cluster.submit([5] * 130, 3))
            prompt = [6] * 60
            with pytest.raises(TooLargeError, match="raise --kv-bytes"):
                await output_of(cluster.submit(prompt, 1000))
            assert await output_of(cluster.submit(prompt, 60)) == mock_output(prompt, 60)
            await cluster.settle()

    simulate(main())


def test_the_second_turn_of_a_conversation_finds_the_first() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["zmq"]) as cluster:
            prompt = list(range(10, 110))
            stream = cluster.submit(prompt, 60)
            turn = prompt + await output_of(stream)
            assert stream.num_cached_tokens == 0
            await asyncio.sleep(HEARTBEAT_S)
            stream = cluster.submit([*turn, 7, 8, 9], 20)
            assert await output_of(stream) == mock_output([*turn, 7, 8, 9], 20)
            # the last token drawn has no KV; of 159 positions 9 blocks are full
            assert stream.num_cached_tokens == 144

    simulate(main())


def test_a_restarted_store_is_joined_again_and_what_ran_goes_on() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES["shm"]) as cluster:
            stream = cluster.submit([9] * 40, 1000)
            await asyncio.sleep(0.2)
            await cluster.restart_store()
            assert await output_of(stream) == mock_output([9] * 40, 1000)
            assert stream.timeline.num_attempts > 1
            assert await output_of(cluster.submit([9] * 40, 30)) == mock_output([9] * 40, 30)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
def test_the_first_token_leaves_before_the_handoff_is_complete(mover: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mover=mover)) as cluster:
            stream = cluster.submit(list(range(10, 1500)), 5)
            assert await output_of(stream) == mock_output(list(range(10, 1500)), 5)
            timeline = stream.timeline
            assert timeline.placed_at < timeline.first_token_at < timeline.handed_over_at
            (prefill,) = cluster.of_role(PrefillRole)
            blocks_moved = prefill.stores[0].mover.num_bytes_moved / MOCK_LAYOUT.block_bytes
            assert blocks_moved == (0 if mover == "auto" else 94)

    simulate(main())
