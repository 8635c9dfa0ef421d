"""Block bytes over several connections to a store, and compressed, in the simulated cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from unittest.mock import patch

import pytest

from common.config import StartError
from common.engine.mock import mock_output
from common.messages import BlockBytes, GetBlocks, Message, PutBlocks
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


@pytest.mark.parametrize(
    ("compression", "encoding"), [("off", ""), ("lossless", "planes"), ("int8", "int8")]
)
def test_blocks_are_compressed_where_that_is_set(compression: str, encoding: str) -> None:
    async def main() -> None:
        world = World(3)
        worker = {"kv_compression": compression}
        async with SimCluster(world, Shape(mover="zmq", num_blocks=4096, worker=worker)) as cluster:
            encodings: set[tuple[str, str]] = set()

            def heard(_pipe: Pipe, message: Message) -> None:
                assert isinstance(message, PutBlocks | GetBlocks | BlockBytes)
                encodings.add((type(message).__name__, message.encoding))

            for kind in (PutBlocks, GetBlocks, BlockBytes):
                listen(world.network, kind, heard)
            assert await output_of(request(cluster, 0)) == mock_output([10, *PROMPT], 4)
            kinds = ("PutBlocks", "GetBlocks", "BlockBytes")
            assert encodings == {(kind, encoding) for kind in kinds}
            await cluster.settle()

    simulate(main())


def test_a_store_that_cannot_read_it_gets_blocks_as_they_are() -> None:
    async def main() -> None:
        world = World(4)
        with patch("services.kvstore.data.ENCODINGS", []):
            worker = {"kv_compression": "lossless"}
            shape = Shape(mover="zmq", num_blocks=4096, worker=worker)
            async with SimCluster(world, shape) as cluster:
                encodings: set[str] = set()
                listen(world.network, PutBlocks, lambda _pipe, put: encodings.add(put.encoding))
                assert await output_of(request(cluster, 0)) == mock_output([10, *PROMPT], 4)
                assert encodings == {""}
                await cluster.settle()

    simulate(main())


def test_what_changes_tokens_is_refused_where_they_must_not_change() -> None:
    async def main() -> None:
        worker = {"kv_compression": "int8", "batch_invariant": True}
        with pytest.raises(StartError, match="int8 changes what is computed"):
            async with SimCluster(World(5), Shape(worker=worker)):
                pass

    simulate(main())
