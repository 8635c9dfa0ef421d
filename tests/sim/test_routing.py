"""Routing in a whole cluster: who computes a prompt, who waits for whom, what is promised."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from common.engine.mock import mock_output
from kvbaton.errors import OverloadedError
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, Targets
from services.gateway.routing.stream import RequestStream
from services.prefill.worker import PrefillRole
from tests.sim.cluster import DATA, HEARTBEAT_S, Shape, SimCluster, output_of, simulate
from tests.sim.disturbances import Narrow
from tests.sim.network import PipeTest
from tests.sim.world import World


def request(cluster: SimCluster, number: int, prompt: list[int], **fields: Any) -> RequestStream:
    sampling = SamplingParams(max_tokens=fields.pop("num_tokens", 4), temperature=0)
    return cluster.give(
        cluster.gateways[0],
        GenerationRequest(request_id=f"r-{number}", prompt=prompt, sampling=sampling, **fields),
    )


def prompt_of(number: int, num_tokens: int) -> list[int]:
    return [10 + number, *range(10, 9 + num_tokens)]


@pytest.mark.parametrize("mover", ["shm", "zmq"])
@pytest.mark.parametrize("max_local_tokens", [0, 64])
def test_a_short_rest_is_computed_by_decode_with_the_same_tokens(
    mover: str, max_local_tokens: int
) -> None:
    async def main() -> None:
        shape = Shape(mover=mover, routing={"max_local_tokens": max_local_tokens})
        async with SimCluster(World(1), shape) as cluster:
            [prefill] = cluster.of_role(PrefillRole)
            long = prompt_of(0, 400)
            first = request(cluster, 0, long)
            assert await output_of(first) == mock_output(long, 4)
            num_computed = prefill.num_tokens_computed
            blockers = [request(cluster, 1 + i, prompt_of(50 + i, 2000)) for i in range(2)]
            await asyncio.sleep(0.01)
            turn = [*long, 7, 8, 9]
            short = request(cluster, 9, turn)
            assert await output_of(short) == mock_output(turn, 4)
            assert short.placement is not None
            assert short.placement.chosen.num_cached_tokens == short.num_cached_tokens == 400
            assert short.placement.is_prefilled_by_decode == bool(max_local_tokens)
            for blocker in blockers:
                await output_of(blocker)
            assert prefill.num_tokens_computed - num_computed == 4000 + 3 * (not max_local_tokens)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize(("step_ms", "token_ms", "do_share"), [(10, 1, False), (50, 1, True)])
def test_prompts_share_a_step_only_until_it_keeps_the_arithmetic_busy(
    step_ms: float, token_ms: float, do_share: bool
) -> None:
    async def main() -> None:
        worker = {"mock_step_ms": step_ms, "mock_token_ms": token_ms}
        routing = {"max_local_tokens": 0}
        async with SimCluster(World(1), Shape(worker=worker, routing=routing)) as cluster:
            blocker = request(cluster, 0, prompt_of(0, 100))
            await asyncio.sleep(0.02)
            streams = [request(cluster, 1 + i, prompt_of(1 + i, 100)) for i in range(3)]
            for stream in (blocker, *streams):
                await output_of(stream)
            first_at = [stream.timeline.first_token_at for stream in streams]
            gaps = [later - sooner for sooner, later in pairwise(first_at)]
            assert all(gap < 0.02 for gap in gaps) if do_share else min(gaps) > 0.1
            await cluster.settle()

    simulate(main())


def test_a_tenant_that_floods_does_not_keep_another_waiting() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_blocks=4096)) as cluster:
            warm = prompt_of(0, 500)
            await output_of(request(cluster, 0, warm))
            flood = [
                request(cluster, 1 + i, prompt_of(1 + i, 2000), owner="flood") for i in range(30)
            ]
            await asyncio.sleep(0.001)
            few = [request(cluster, 90 + i, prompt_of(60 + i, 100), owner="few") for i in range(3)]
            urgent = request(cluster, 99, prompt_of(80, 100), owner="flood", priority=-1)
            for stream in (*few, urgent, *flood):
                await output_of(stream)
            first_at = sorted(stream.timeline.first_token_at for stream in flood)
            assert urgent.timeline.first_token_at < first_at[9]
            assert max(stream.timeline.first_token_at for stream in few) < first_at[9]
            await cluster.settle()

    simulate(main())


def test_what_would_come_late_is_refused_with_the_prediction() -> None:
    async def main() -> None:
        shape = Shape(num_blocks=4096, routing={"refuses_late": True})
        async with SimCluster(World(1), shape) as cluster:
            await output_of(request(cluster, 0, prompt_of(0, 2000)))  # now steps are known
            for number in range(10):
                request(cluster, 1 + number, prompt_of(1 + number, 2000))
            await asyncio.sleep(0.001)
            with pytest.raises(OverloadedError, match=r"would take about \d+ ms .* than the 50 ms"):
                request(cluster, 50, prompt_of(50, 100), targets=Targets(ttft_ms=50))
            patient = request(cluster, 51, prompt_of(51, 100), targets=Targets(ttft_ms=60_000))
            assert await output_of(patient) == mock_output(prompt_of(51, 100), 4)
            assert patient.placement is not None
            assert patient.placement.chosen.meets_targets
            for stream in cluster.gateways[0].streams:
                stream.cancel()
            await cluster.settle()

    simulate(main())


def test_a_session_stays_and_idle_workers_share_what_has_none() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(num_prefill=3, num_decode=3)) as cluster:
            workers: dict[str, list[str]] = {"": [], "s": []}
            for number in range(24):
                session = "s" * (number % 2)
                stream = request(cluster, number, prompt_of(number, 60), session_id=session)
                await output_of(stream)
                workers[session].append(stream.timeline.decode_worker)
            assert len(set(workers["s"])) == 1
            assert max(Counter(workers[""]).values()) <= 8
            await asyncio.sleep(HEARTBEAT_S)

    simulate(main())


def test_predictions_of_an_idle_cluster_come_true() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            ratios = []
            for number in range(30):
                stream = request(cluster, number, prompt_of(number, 50 + 40 * (number % 9)))
                await output_of(stream)
                assert stream.placement is not None
                timeline, expected = stream.timeline, stream.placement.chosen
                actual_ms = (timeline.first_token_at - timeline.received_at) * 1000
                ratios.append(actual_ms / expected.ttft_ms)
            late = sorted(ratios[10:])
            assert 0.9 < late[len(late) // 2] < 1.6, late

    simulate(main())


def narrow(world: World, bytes_per_s: float) -> list[Narrow]:
    """Block bytes leave and reach the store by a link that carries so much each way."""

    def carries(to_store: bool) -> PipeTest:
        return lambda pipe: pipe.dealer.endpoint == DATA[0] and pipe.to_router == to_store

    links = [Narrow(carries(to_store), bytes_per_s=bytes_per_s) for to_store in (True, False)]
    for link in links:
        world.network.begin(link)
    return links


def test_a_prompt_stays_where_it_is_needed_while_the_link_is_too_slow_for_its_kv() -> None:
    async def main() -> None:
        world = World(1)
        shape = Shape(mover="zmq", num_blocks=4096, routing={"max_local_tokens": 64})
        async with SimCluster(world, shape) as cluster:
            numbers = iter(range(1000))

            async def serve() -> RequestStream:
                number = next(numbers)
                prompt = prompt_of(number, 400)
                stream = request(cluster, number, prompt)
                assert await output_of(stream) == mock_output(prompt, 4)
                await asyncio.sleep(HEARTBEAT_S)
                return stream

            fast = [await serve() for _ in range(4)]
            links = narrow(world, 1e6)  # a prompt's 100 kB take 0.1 s, computing them 25 ms
            slow = [await serve() for _ in range(12)]
            for link in links:
                assert link.num_struck
                world.network.end(link)
            await asyncio.sleep(300)  # what was measured is believed no more
            again = [await serve() for _ in range(4)]
            for stream in (*fast, *slow[-6:], *again):
                assert stream.placement is not None
                even = stream.placement.chosen.break_even
                assert even is not None
                is_slow = stream in slow
                assert even.pays != is_slow, even
                assert stream.placement.is_prefilled_by_decode == is_slow
                assert ("takes longer" in stream.placement.reason) == is_slow
            await cluster.settle()

    simulate(main())
