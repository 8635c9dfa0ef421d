"""Bytes under way are bounded each way: who stalls holds up its own transfers, nobody else's."""

from __future__ import annotations

import asyncio

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import GetBlocks, PutBlocks
from common.worker.mover import BYTES_IN_FLIGHT
from services.decode.worker import DecodeRole
from services.prefill.worker import PrefillRole
from tests.sim.cluster import DATA, Shape, SimCluster, listen, output_of, simulate, until
from tests.sim.disturbances import Hold
from tests.sim.network import Pipe
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
MOST_BLOCKS = BYTES_IN_FLIGHT // MOCK_LAYOUT.block_bytes
PROMPT_BLOCKS = 500
NUM_PROMPTS = MOST_BLOCKS // PROMPT_BLOCKS + 3
SHAPE = Shape(num_prefill=2, num_decode=2, mover="zmq", num_blocks=6000)


def prompts() -> list[list[int]]:
    return [[number] * (PROMPT_BLOCKS * BLOCK) + [1] for number in range(5, 5 + NUM_PROMPTS)]


def test_a_stalled_decode_worker_has_so_many_bytes_on_their_way_and_no_more() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            network = cluster.world.network
            stalled, other = cluster.of_role(DecodeRole)
            link = network.dealer(stalled.seams.pid, DATA[0])
            num_asked = 0

            def on_get(pipe: Pipe, message: GetBlocks) -> None:
                nonlocal num_asked
                num_asked += len(message.indexes) * (pipe.dealer is link)

            listen(network, GetBlocks, on_get)
            hold = Hold(lambda pipe: pipe is link.incoming)
            network.begin(hold)
            streams = [cluster.submit(prompt, 3) for prompt in prompts() * 2]
            await asyncio.sleep(20)
            at_stalled = [s for s in streams if s.timeline.decode_worker == stalled.config.name]
            at_other = [s for s in streams if s.timeline.decode_worker == other.config.name]
            assert len(at_stalled) * PROMPT_BLOCKS > MOST_BLOCKS
            assert 0 < num_asked <= MOST_BLOCKS
            assert all(stream.is_over for stream in at_other)
            assert not any(stream.is_over for stream in at_stalled)
            network.end(hold)
            for stream in at_stalled:
                assert await output_of(stream) == mock_output(stream.request.prompt, 3)
            await cluster.settle()

    simulate(main())


def test_a_store_that_takes_nothing_stops_the_sender() -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPE) as cluster:
            network = cluster.world.network
            links = [
                network.dealer(worker.seams.pid, DATA[0]) for worker in cluster.of_role(PrefillRole)
            ]
            num_sent = dict.fromkeys(links, 0)

            def on_put(pipe: Pipe, message: PutBlocks) -> None:
                num_sent[pipe.dealer] = num_sent.get(pipe.dealer, 0) + len(message.blocks)

            listen(network, PutBlocks, on_put)
            hold = Hold(lambda pipe: pipe.dealer in links and not pipe.to_router)  # no answers
            network.begin(hold)
            streams = [cluster.submit(prompt, 3) for prompt in prompts() * 2]
            await until(lambda: all(num_sent[link] > 0 for link in links))
            await asyncio.sleep(20)
            assert max(num_sent[link] for link in links) <= MOST_BLOCKS
            network.end(hold)
            for stream in streams:
                assert await output_of(stream) == mock_output(stream.request.prompt, 3)
            await cluster.settle()

    simulate(main())
