"""A prompt's log-probabilities come whole, with the first token, from KV that is all its own.

The mock engine's are a function of the KV that it reads at each position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many

import pytest

from common.engine.mock import MockEngine, mock_output, mock_scores
from common.engine.work import Engine, Sampled, Work
from common.scores import unpack_scores
from common.worker.config import WorkerConfig
from kvbaton.errors import KvbatonError
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest
from services.gateway.routing.stream import RequestStream
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Shape, SimCluster, output_of, simulate, until
from tests.sim.test_cluster_in_memory import SHAPES, random_prompt
from tests.sim.world import World

CHUNKS = {"max_num_batched_tokens": 48}


def ask(
    cluster: SimCluster, prompt: list[int], num_tokens: int, resumed: tuple[int, ...] = ()
) -> RequestStream:
    gateway = cluster.world.random.choice(cluster.gateways)
    sampling = SamplingParams(prompt_logprobs=0, max_tokens=num_tokens, temperature=0)
    request_id = f"scored-{cluster.world.random.randrange(2**32)}"
    return cluster.give(gateway, GenerationRequest(request_id, prompt, sampling, resumed=resumed))


def is_scored(stream: RequestStream) -> bool:
    prompt = stream.request.prompt
    rows = unpack_scores(mock_scores(prompt), len(prompt) - 1) if len(prompt) > 1 else []
    found = [[(each.token_id, each.logprob), *each.top_logprobs] for each in stream.prompt_logprobs]
    return found == rows


async def check(stream: RequestStream, num_tokens: int) -> None:
    """The prompt's with the first token, and the tokens that follow."""
    event = await anext(stream)
    assert event.index == len(stream.request.resumed)
    assert is_scored(stream)
    while event.finish_reason is None:
        event = await anext(stream)
    assert stream.tokens == mock_output(stream.request.prompt, num_tokens)
    assert is_scored(stream)
    assert stream.num_cached_tokens == 0


async def serve(cluster: SimCluster, num_requests: int) -> None:
    """Requests at random times, every second of them scored; prompts begin alike."""
    rng = cluster.world.random

    async def one(index: int) -> None:
        await asyncio.sleep(rng.uniform(0, 1))
        prompt, num_tokens = random_prompt(rng), rng.randrange(1, 30)
        if index % 2:
            await check(ask(cluster, prompt, num_tokens), num_tokens)
        else:
            stream = cluster.submit(prompt, num_tokens)
            assert await output_of(stream) == mock_output(prompt, num_tokens)
            assert stream.prompt_logprobs == []

    await asyncio.gather(*(one(index) for index in range(num_requests)))


@pytest.mark.parametrize(
    "name", ["shm", "zmq", "colocated", "colocated_zmq", "two_stores_zmq", "two_gateways"]
)
def test_prompts_are_scored_in_every_shape(name: str) -> None:
    async def main() -> None:
        async with SimCluster(World(1), SHAPES[name]) as cluster:
            await serve(cluster, 16)
            prompt = [9] * 200
            assert await output_of(cluster.submit(prompt, 9)) == mock_output(prompt, 9)
            await check(ask(cluster, prompt, 9), 9)  # what is cached is computed again
            await check(ask(cluster, [7], 9), 9)
            await check(ask(cluster, prompt, 30, tuple(mock_output(prompt, 12))), 30)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mover", ["auto", "zmq"])
@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_an_attempt_that_fails_is_scored_anew(
    mover: str, role: type[PrefillRole | DecodeRole], how: str
) -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, mover=mover, worker=CHUNKS)
        async with SimCluster(World(5), shape) as cluster:
            serving = asyncio.ensure_future(serve(cluster, 20))
            await asyncio.sleep(0.4)
            victim = cluster.of_role(role)[0]
            await until(
                lambda: any(seq.sampling.prompt_logprobs == 0 for seq in victim.role.sequences())
            )
            await (cluster.kill if how == "killed" else cluster.drain)(victim)
            await serving
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_prompts_are_scored_when_blocks_run_out(mode: str) -> None:
    shape = Shape(num_decode=2, num_blocks=24, mode=mode, worker={"max_num_seqs": 8} | CHUNKS)

    async def main() -> None:
        async with SimCluster(World(3), shape) as cluster:
            rng = cluster.world.random

            async def one() -> None:
                prompt, num_tokens = random_prompt(rng, 60), rng.randrange(60, 120)
                await check(ask(cluster, prompt, num_tokens), num_tokens)

            await asyncio.gather(*(one() for _ in range(12)))
            decodes = cluster.of_role(DecodeRole)
            assert sum(each.counts().num_preemptions for each in decodes) > 0
            await cluster.settle()

    simulate(main())


def test_a_restarted_store_changes_nothing() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(worker=CHUNKS)) as cluster:
            prompts = [[each] * 900 for each in range(9, 13)]
            checks = [asyncio.ensure_future(check(ask(cluster, p, 40), 40)) for p in prompts]
            await asyncio.sleep(0.1)
            await cluster.restart_store()
            await asyncio.gather(*checks)
            await cluster.settle()

    simulate(main())


class _Forgetful(MockEngine):
    """Scores the first chunk of a prompt only."""

    async def step(self, works: Many[Work]) -> list[Sampled | None]:
        results = await super().step(works)
        for work in works:
            work.scores = b"" if work.start else work.scores
        return results


def test_scores_that_are_not_whole_fail_the_request_and_nothing_else() -> None:
    def forgetful(_config: WorkerConfig) -> Engine:
        return _Forgetful(0.005, 0.0)

    async def main() -> None:
        async with SimCluster(World(1), Shape(worker=CHUNKS, engine=forgetful)) as cluster:
            with pytest.raises(KvbatonError, match="not whole"):
                await check(ask(cluster, [9] * 100, 9), 9)
            await check(ask(cluster, [9] * 40, 9), 9)
            await cluster.settle()

    simulate(main())
