"""Requests that a prefill worker decodes itself, as decode has no room for them."""

from __future__ import annotations

import asyncio

import pytest

from common.engine.mock import mock_output
from common.worker.runtime import WorkerRuntime
from services.gateway.backend import Targets
from services.gateway.routing.decision import Decision
from services.gateway.routing.stream import RequestStream
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.test_pace import arrivals, gaps_ms
from tests.sim.test_routing import prompt_of, request
from tests.sim.world import World

NUM_TOKENS = 300
FEW_PLACES = {"max_num_seqs": 2}


def decision_of(stream: RequestStream) -> Decision:
    assert stream.placement is not None
    return stream.placement


def is_kept(stream: RequestStream) -> bool:
    return decision_of(stream).chosen.decode.startswith("prefill")


def tpot_ms(at: list[float]) -> float:
    return (at[-1] - at[0]) / (len(at) - 1) * 1000


@pytest.mark.parametrize("local_decode", [True, False])
def test_prefill_keeps_what_decode_could_not_serve_in_time(local_decode: bool) -> None:
    async def main() -> None:
        steps = {"mock_step_ms": 5, "mock_token_ms": 1}  # of 15 sequences: 20 ms
        routing = {"local_decode": local_decode}
        shape = Shape(worker=steps, routing=routing, num_blocks=4096)
        async with SimCluster(World(1), shape) as cluster:
            [prefill] = cluster.of_role(PrefillRole)
            targets = Targets(ttft_ms=5000, tpot_ms=20)
            await arrivals(request(cluster, 0, prompt_of(0, 40), targets=targets))
            streams = []
            for number in range(1, 22):
                prompt = prompt_of(number, 40)
                streams.append(request(cluster, number, prompt, num_tokens=200, targets=targets))
                await asyncio.sleep(0.05)
            tasks = [asyncio.create_task(arrivals(stream)) for stream in streams]
            await asyncio.sleep(0.5)
            late = request(cluster, 30, prompt_of(30, 400), num_tokens=2, targets=targets)
            asked_at = asyncio.get_running_loop().time()
            [late_at, _] = await arrivals(late)
            all_at = await asyncio.gather(*tasks)
            kept = [stream for stream in streams if is_kept(stream)]
            num_met = sum(tpot_ms(at) <= 20 for at in all_at)
            if not local_decode:
                assert not kept
                assert num_met < len(streams) / 2
                return
            assert 3 <= len(kept) <= 8
            assert num_met == len(streams)
            assert "stays at prefill" in decision_of(kept[0]).reason
            # 5 ms, one for each that runs, a block of a prompt, which is the least, and the way.
            longest_ms = 5 + len(kept) + prefill.block_size + 2
            assert max(gaps_ms(all_at[streams.index(kept[0])])[1:]) <= longest_ms
            assert late_at - asked_at < 4 * 0.4, "a quarter of a step is left to prompts"
            await cluster.settle()

    simulate(main())


async def crowd(cluster: SimCluster) -> tuple[list[RequestStream], WorkerRuntime]:
    """More requests than decode has places, and a prefill worker that decodes one of them."""
    streams = []
    for number in range(4):
        streams.append(request(cluster, number, prompt_of(number, 40), num_tokens=NUM_TOKENS))
        await asyncio.sleep(0.1)
    kept = [stream for stream in streams if is_kept(stream)]
    assert len(kept) == 2
    name = decision_of(kept[0]).chosen.decode
    [keeper] = [worker for worker in cluster.workers if worker.config.name == name]
    assert keeper.role.load().num_decoding > 0
    return streams, keeper


async def check_outputs(streams: list[RequestStream]) -> None:
    for stream in streams:
        assert await output_of(stream) == mock_output(stream.request.prompt, NUM_TOKENS)


@pytest.mark.parametrize("mover", ["shm", "zmq"])
@pytest.mark.parametrize("is_drained", [False, True])
def test_what_prefill_keeps_goes_on_elsewhere_when_it_leaves(mover: str, is_drained: bool) -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, worker=FEW_PLACES, mover=mover)
        async with SimCluster(World(1), shape) as cluster:
            streams, keeper = await crowd(cluster)
            num_kept = keeper.role.load().num_decoding
            await (cluster.drain(keeper) if is_drained else cluster.kill(keeper))
            await check_outputs(streams)
            moved = [stream for stream in streams if stream.timeline.num_attempts > 1]
            assert len(moved) == num_kept
            num_recomputed = sum(each.num_tokens_computed for each in cluster.workers)
            if is_drained:  # at most the position whose logits give the next token
                most = sum(40 + NUM_TOKENS for _ in streams) - keeper.num_tokens_computed
                assert num_recomputed <= most
            await cluster.settle()

    simulate(main())


def test_prompts_are_computed_and_handed_over_beside_what_is_kept() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(worker=FEW_PLACES)) as cluster:
            streams, keeper = await crowd(cluster)
            await output_of(streams[0])  # it leaves a place at decode
            later = request(cluster, 9, prompt_of(9, 40), num_tokens=NUM_TOKENS)
            await check_outputs([*streams[1:], later])
            assert later.timeline.prefill_worker == keeper.config.name
            assert not is_kept(later)
            await cluster.settle()

    simulate(main())


def test_what_is_kept_gives_way_where_blocks_run_out_and_goes_on() -> None:
    async def main() -> None:
        shape = Shape(worker=FEW_PLACES, num_blocks=64)  # four of 340 tokens: 88
        async with SimCluster(World(1), shape) as cluster:
            streams, keeper = await crowd(cluster)
            await check_outputs(streams)
            num_preemptions = sum(each.counts().num_preemptions for each in cluster.workers)
            assert num_preemptions > 0
            assert keeper.counts().num_preemptions > 0
            await cluster.settle()

    simulate(main())
