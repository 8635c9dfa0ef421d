"""How much is computed twice when workers leave or die: counted, in positions."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.worker.runtime import WorkerRuntime
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Shape, SimCluster, output_of, simulate, until
from tests.sim.world import World

PROMPTS = [[number + 5] * (40 + 7 * number) for number in range(10)]
NUM_OUTPUTS = 120
# The last token that is drawn is not computed any more.
UNDISTURBED = sum(len(prompt) + NUM_OUTPUTS - 1 for prompt in PROMPTS)
BLOCK = 16


def num_computed(workers: list[WorkerRuntime]) -> int:
    return sum(worker.num_tokens_computed for worker in workers)


@pytest.mark.parametrize("mover", ["shm", "zmq"])
@pytest.mark.parametrize("role", [DecodeRole, PrefillRole])
def test_an_announced_departure_costs_not_one_position(
    role: type[DecodeRole | PrefillRole], mover: str
) -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, mover=mover)
        async with SimCluster(World(1), shape) as cluster:
            workers = list(cluster.workers)
            streams = [cluster.submit(prompt, NUM_OUTPUTS) for prompt in PROMPTS]
            least = 3 if role is DecodeRole else 0
            await until(lambda: all(len(stream.tokens) >= least for stream in streams))
            await asyncio.sleep(0.02)
            leaving = cluster.of_role(role)[0]
            hit = [each for each in streams if each.timeline.num_attempts == 1]
            await leaving.drain()
            await asyncio.sleep(0.01)  # what it has said arrives
            await cluster.kill(leaving)
            for stream, prompt in zip(streams, PROMPTS, strict=True):
                assert await output_of(stream) == mock_output(prompt, NUM_OUTPUTS)
            if role is DecodeRole:
                assert any(stream.timeline.num_attempts > 1 for stream in hit)
            assert num_computed(workers) == UNDISTURBED
            await cluster.settle()

    simulate(main())


def test_every_worker_is_replaced_in_turn_and_nothing_is_computed_twice() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_prefill=2, num_decode=2)) as cluster:
            workers = list(cluster.workers)
            streams = [cluster.submit(prompt, NUM_OUTPUTS) for prompt in PROMPTS]
            for worker in list(workers):
                role = "decode" if isinstance(worker.role, DecodeRole) else "prefill"
                await worker.drain()
                await asyncio.sleep(0.01)
                await cluster.kill(worker)
                workers.append(await cluster.add_worker(role))
                await asyncio.sleep(0.1)
            for stream, prompt in zip(streams, PROMPTS, strict=True):
                assert await output_of(stream) == mock_output(prompt, NUM_OUTPUTS)
            assert max(stream.timeline.num_attempts for stream in streams) > 2
            assert num_computed(workers) == UNDISTURBED
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["shm", "zmq"])
def test_a_dead_decode_worker_costs_each_sequence_at_most_its_unfinished_block(mover: str) -> None:
    """And what was final but had not been said yet when it died."""

    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, mover=mover)
        async with SimCluster(World(1), shape) as cluster:
            workers = list(cluster.workers)
            streams = [cluster.submit(prompt, NUM_OUTPUTS) for prompt in PROMPTS]
            await until(lambda: all(len(stream.tokens) > 40 for stream in streams))
            await cluster.kill(cluster.of_role(DecodeRole)[0])
            for stream, prompt in zip(streams, PROMPTS, strict=True):
                assert await output_of(stream) == mock_output(prompt, NUM_OUTPUTS)
            num_hit = sum(stream.timeline.num_attempts > 1 for stream in streams)
            assert num_hit > 3
            twice = num_computed(workers) - UNDISTURBED
            assert 0 < twice <= num_hit * (BLOCK + 1)
            await cluster.settle()

    simulate(main())
