"""Prompts computed beside running sequences: these keep to their targets, and both workers work."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from common.engine.mock import mock_output
from services.decode.worker import DecodeRole
from services.gateway.backend import Targets
from services.gateway.routing.stream import RequestStream
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Shape, SimCluster, simulate
from tests.sim.test_routing import prompt_of, request
from tests.sim.world import World

TARGET_MS = 60.0
SLOW = {"mock_step_ms": 10, "mock_token_ms": 1}  # a chunk of 512 tokens: 522 ms


async def arrivals(stream: RequestStream) -> list[float]:
    """When each token came; they are the right ones."""
    loop, tokens, at = asyncio.get_running_loop(), [], []
    async for event in stream:
        tokens.append(event.token_id)
        at.append(loop.time())
        if event.finish_reason is not None:
            break
    assert tokens == mock_output(stream.request.prompt, len(tokens))
    return at


def gaps_ms(at: list[float]) -> list[float]:
    return [(later - sooner) * 1000 for sooner, later in itertools.pairwise(at)]


@pytest.mark.parametrize("has_target", [True, False])
def test_a_long_prompt_keeps_others_waiting_no_longer_than_their_target(has_target: bool) -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mode="colocated", num_prefill=0, worker=SLOW)) as c:
            await arrivals(request(c, 0, prompt_of(0, 40)))  # its steps are known from now on
            targets = Targets(tpot_ms=TARGET_MS if has_target else 0.0)
            talker = request(c, 1, prompt_of(1, 40), num_tokens=100, targets=targets)
            task = asyncio.create_task(arrivals(talker))
            await asyncio.sleep(0.2)
            [first_at, *_] = await arrivals(request(c, 2, prompt_of(2, 2000)))
            at = await task
            assert at[-1] > first_at, "they ran beside each other"
            assert (max(gaps_ms(at)) <= TARGET_MS) is has_target
            await c.settle()

    simulate(main())


@pytest.mark.parametrize(("ttft_ms", "is_urgent"), [(10_000, False), (1_000, True), (0, True)])
def test_a_prompt_with_time_to_spare_leaves_it_to_the_tokens_of_others(
    ttft_ms: float, is_urgent: bool
) -> None:
    """Where a block alone takes longer than a token may: only a prompt in a hurry is given one."""

    async def main() -> None:
        worker = {"mock_step_ms": 10, "mock_token_ms": 4}  # a token beside a block: 78 ms
        async with SimCluster(World(1), Shape(mode="colocated", num_prefill=0, worker=worker)) as c:
            await arrivals(request(c, 0, prompt_of(0, 40)))
            talker = request(
                c, 1, prompt_of(1, 40), num_tokens=400, targets=Targets(tpot_ms=TARGET_MS)
            )
            task = asyncio.create_task(arrivals(talker))
            await asyncio.sleep(0.5)
            learns = request(c, 2, prompt_of(2, 40))  # what a prompt's token takes beside others
            await arrivals(learns)
            asked_at = asyncio.get_running_loop().time()
            prompt = request(c, 3, prompt_of(3, 200), targets=Targets(ttft_ms=ttft_ms))
            [first_at, *_] = await arrivals(prompt)
            at = [each for each in await task if asked_at <= each]
            assert at[-1] > first_at, "they ran beside each other"
            beside = [each for each in at if each <= first_at]
            assert (max(gaps_ms(beside)) > TARGET_MS) is is_urgent
            if not is_urgent:
                assert first_at - asked_at <= ttft_ms / 1000
            await c.settle()

    simulate(main())


@pytest.mark.parametrize("max_local_tokens", [0, 64])
def test_decode_takes_prompts_that_would_wait_at_prefill(max_local_tokens: int) -> None:
    async def main() -> None:
        shape = Shape(worker=SLOW, routing={"max_local_tokens": max_local_tokens}, num_blocks=4096)
        async with SimCluster(World(1), shape) as cluster:
            [prefill], [decode] = cluster.of_role(PrefillRole), cluster.of_role(DecodeRole)
            targets = Targets(ttft_ms=2000, tpot_ms=TARGET_MS)
            await arrivals(request(cluster, 0, prompt_of(0, 500), targets=targets))
            num_before = prefill.num_tokens_computed
            streams = [
                request(
                    cluster, 1 + number, prompt_of(1 + number, 500), num_tokens=40, targets=targets
                )
                for number in range(6)
            ]
            started_at = asyncio.get_running_loop().time()
            all_at = await asyncio.gather(*map(arrivals, streams))
            num_met = sum(
                at[0] - started_at <= 2 and (at[-1] - at[0]) / 39 <= TARGET_MS / 1000
                for at in all_at
            )
            num_at_decode = 6 - (prefill.num_tokens_computed - num_before) // 500
            assert (num_at_decode, num_met) == ((0, 3) if max_local_tokens == 0 else (3, 5))
            assert decode.num_tokens_computed >= 500 * num_at_decode
            for at in all_at:
                assert max(gaps_ms(at)[1:]) <= TARGET_MS
            await cluster.settle()

    simulate(main())
