"""What is computed once: choices of a request share their prompt, until the cache is dropped."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from kvbaton.sampling import SamplingParams
from services.gateway.access.admin import drop_cache
from services.gateway.access.quotas import Charge, Limits, Quota
from services.gateway.backend import GenerationRequest
from services.gateway.http.openai.choices import Choices, Job
from services.gateway.routing.stream import RequestStream
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.world import World
from tests.unit.gateway_fakes import FakeRng, demo_model

BLOCK = MOCK_LAYOUT.block_size
PROMPT = [9] * (20 * BLOCK) + [7] * 3

SHAPES = {
    "disaggregated": Shape(num_prefill=2, num_decode=2),
    "colocated": Shape(num_prefill=0, num_decode=2, mode="colocated"),
    "disk": Shape(num_prefill=2, num_decode=2, disk_bytes=2000 * MOCK_LAYOUT.block_bytes),
}


class Recorder:
    """The dispatcher, and every stream that it gave."""

    def __init__(self, cluster: SimCluster) -> None:
        self._backend = cluster.gateways[0].dispatcher
        self.streams: list[RequestStream] = []

    @property
    def max_model_len(self) -> int | None:
        return self._backend.max_model_len

    @property
    def ready(self) -> bool:
        return self._backend.ready

    def submit(self, request: GenerationRequest) -> RequestStream:
        self.streams.append(self._backend.submit(request))
        return self.streams[-1]

    def stats(self) -> dict[str, float]:
        return {}


def job(n: int) -> Job:
    return Job(
        like=GenerationRequest("choices", [], SamplingParams(max_tokens=4)),
        prompts=[PROMPT],
        n=n,
        best_of=n,
        stop=(),
        include_stop=False,
        skip_special_tokens=True,
        drops_output=False,
        charge=Charge(Quota(Limits(), 0), 0),
        rng=FakeRng(),
    )


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_choices_share_the_blocks_of_one_prefill(mode: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES[mode]) as cluster:
            backend = Recorder(cluster)
            clock = cluster.gateways[0].seams.clock
            several = Choices(job(n=5), backend, demo_model(), clock)
            outputs: list[list[int]] = [[] for _ in range(5)]
            async for index, token in several:
                outputs[index].append(token.token_id)
            await several.close()
            assert outputs == [mock_output(PROMPT, 4)] * 5
            assert [stream.num_cached_tokens for stream in backend.streams] == [
                0, *[20 * BLOCK] * 4,
            ]  # fmt: skip
            usage = several.usage()
            assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (
                len(PROMPT), 0,
            )  # fmt: skip
            await cluster.settle()

    simulate(main())


async def serve(cluster: SimCluster) -> int:
    """Serve the prompt. Returns how many tokens of it were cached."""
    stream = cluster.submit(PROMPT, 4)
    assert await output_of(stream) == mock_output(PROMPT, 4)
    return stream.num_cached_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_that_is_dropped_is_found_no_more(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(2), SHAPES[name]) as cluster:
            stores = cluster.gateways[0].dispatcher.fleet.stores
            assert [await serve(cluster) for _ in range(2)] == [0, 20 * BLOCK]
            await asyncio.sleep(1)
            assert await drop_cache(stores) >= 20
            assert await drop_cache(stores) == 0
            assert [await serve(cluster) for _ in range(2)] == [0, 20 * BLOCK]
            (ledger,) = cluster.ledgers()
            ledger.check()
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", SHAPES)
def test_who_reads_goes_on_when_the_cache_is_dropped(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(3), SHAPES[name]) as cluster:
            stores = cluster.gateways[0].dispatcher.fleet.stores

            async def ask(number: int) -> None:
                prompt = [9] * (number * BLOCK) + [number]
                assert await output_of(cluster.submit(prompt, 60)) == mock_output(prompt, 60)

            asks = [asyncio.create_task(ask(number)) for number in range(1, 12)]
            num_dropped = 0
            while not all(task.done() for task in asks):
                await asyncio.sleep(0.05)
                num_dropped += await drop_cache(stores)
                (ledger,) = cluster.ledgers()
                ledger.check()
            await asyncio.gather(*asks)
            assert num_dropped > 12, "so some were dropped while they were read"
            await cluster.settle()

    simulate(main())


def test_what_is_on_the_disk_is_dropped_as_well() -> None:
    async def main() -> None:
        shape = Shape(num_blocks=128, disk_bytes=2000 * MOCK_LAYOUT.block_bytes)
        async with SimCluster(World(4), shape) as cluster:
            stores = cluster.gateways[0].dispatcher.fleet.stores

            async def ask(number: int) -> int:
                prompt = [number] * (20 * BLOCK) + [1]
                stream = cluster.submit(prompt, 4)
                assert await output_of(stream) == mock_output(prompt, 4)
                return stream.num_cached_tokens

            async def ask_all() -> list[int]:
                return [await ask(number) for number in range(5, 20)]

            assert await ask_all() == [0] * 15
            assert await ask_all() == [20 * BLOCK] * 15, "more than memory holds"
            await drop_cache(stores)
            assert await ask_all() == [0] * 15
            assert await ask_all() == [20 * BLOCK] * 15
            await cluster.settle()

    simulate(main())
