"""Block bytes over several connections to a store, in the simulated cluster."""

from __future__ import annotations

import asyncio
from collections import Counter

from common.engine.mock import mock_output
from common.messages import GetBlocks, PutBlocks
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest
from services.gateway.routing.stream import RequestStream
from tests.sim.cluster import DATA, Shape, SimCluster, listen, output_of, simulate
from tests.sim.network import Pipe
from tests.sim.world import World

PROMPT = list(range(10, 10 + 16 * 1200))  # blocks of 4 KiB: 256 go in a message
SHAPE = Shape(
    mover="zmq", num_blocks=4096, worker={"data_connections": 3, "max_num_batched_tokens": 32768}
)


def request(cluster: SimCluster, number: int) -> RequestStream:
    sampling = SamplingParams(max_tokens=4, temperature=0)
    prompt = [10 + number, *PROMPT]
    generation = GenerationRequest(request_id=f"r-{number}", prompt=prompt, sampling=sampling)
    return cluster.give(cluster.gateways[0], generation)


def test_blocks_of_a_prompt_go_over_all_connections() -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, SHAPE) as cluster:
            puts: Counter[Pipe] = Counter()
            gets: Counter[Pipe] = Counter()
            listen(world.network, PutBlocks, lambda pipe, _message: puts.update([pipe]))
            listen(world.network, GetBlocks, lambda pipe, _message: gets.update([pipe]))
            dealers = [each for each in world.network.dealers if each.endpoint == DATA[0]]
            assert len(dealers) == 3 * len(cluster.workers)
            assert await output_of(request(cluster, 0)) == mock_output([10, *PROMPT], 4)
            assert (len(puts), len(gets)) == (3, 3)
            await cluster.settle()

    simulate(main())


def test_one_that_breaks_costs_no_request() -> None:
    async def main() -> None:
        world = World(2)
        async with SimCluster(world, SHAPE) as cluster:
            streams = [request(cluster, number) for number in range(2)]
            for _ in range(6):
                await asyncio.sleep(0.02)
                for dealer in world.network.dealers:
                    if dealer.endpoint == DATA[0] and dealer.outgoing.name.startswith("decode"):
                        world.network.break_link(dealer)
                        break
            for number, stream in enumerate(streams):
                assert await output_of(stream) == mock_output([10 + number, *PROMPT], 4)
            await cluster.settle()

    simulate(main())
