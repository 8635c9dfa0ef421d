"""What a gateway tells of a request, in the simulated cluster: complete, in order, and true."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import Fill, OpenHandoff, Prefill, Reserve
from kvbaton.explanation import Explanation
from kvbaton.sampling import SamplingParams
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest
from services.gateway.observe.recent import Ended, Recent
from services.prefill.worker import PrefillRole
from tests.sim.cluster import Shape, SimCluster, listen, output_of, simulate, until
from tests.sim.scenario import run_seed
from tests.sim.world import World

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DISAGGREGATED = [
    "tokenize", "queue", "store", "decode_place", "blocks", "prefill_queue", "prefill", "handoff",
    "join", "decode",
]  # fmt: skip
COLOCATED = [name for name in DISAGGREGATED if name not in ("handoff", "join")]


class Told(msgspec.Struct):
    requests: list[Explanation]


def explanations(cluster: SimCluster) -> dict[str, Explanation]:
    """Of all requests that have ended, by id."""
    recent = cluster.gateways[0].dispatcher.watch.recent
    told = msgspec.json.decode(recent.latest(1000, None), type=Told).requests
    return {each.id: each for each in told}


def assert_ordered(explanation: Explanation) -> None:
    stages = explanation.stages
    assert stages[0].start_ms == 0
    assert stages[-1].end_ms == explanation.total_ms
    for before, after in itertools.pairwise(stages):
        assert before.start_ms <= before.end_ms == after.start_ms


def assert_whole(explanation: Explanation) -> None:
    assert_ordered(explanation)
    assert explanation.ttft_ms is not None
    assert 0 < explanation.ttft_ms <= explanation.total_ms


@pytest.mark.parametrize("mover", ["auto", "zmq"])
@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_a_request_is_told_from_its_coming_to_its_last_token(mode: str, mover: str) -> None:
    shape = Shape(num_prefill=2, num_decode=2, mode=mode, mover=mover)
    if mode == "colocated":
        shape.num_prefill = 0
    prompt = list(range(5, 705))  # more than one step takes

    async def main() -> Explanation:
        async with SimCluster(World(1), shape) as cluster:
            stream = cluster.submit(prompt, 20)
            assert await output_of(stream) == mock_output(prompt, 20)
            await cluster.settle()
            return explanations(cluster)[stream.request_id]

    explanation = simulate(main())
    assert_whole(explanation)
    expected = DISAGGREGATED if mode == "disaggregated" else COLOCATED
    assert [stage.name for stage in explanation.stages] == expected
    assert all(stage.worker.startswith("decode") for stage in explanation.stages[-1:])
    assert sum(chunk.num_tokens for chunk in explanation.chunks) == len(prompt)
    assert len(explanation.chunks) > 1
    prefill = next(stage for stage in explanation.stages if stage.name == "prefill")
    assert explanation.chunks[0].start_ms == prefill.start_ms
    assert explanation.chunks[-1].end_ms <= prefill.end_ms
    assert {chunk.worker for chunk in explanation.chunks} == {prefill.worker}
    assert explanation.outcome == "length"
    assert (explanation.num_prompt_tokens, explanation.num_output_tokens) == (700, 20)
    assert explanation.predicted_ttft_ms is not None
    assert explanation.verdict.ttft is not None
    assert explanation.verdict.tpot is not None
    num_moved = sum(each.num_early_bytes + each.num_late_bytes for each in explanation.moved)
    num_blocks = -(-len(prompt) // MOCK_LAYOUT.block_size)
    is_handed_over = mode == "disaggregated" and mover == "zmq"
    assert num_moved == (num_blocks * MOCK_LAYOUT.block_bytes if is_handed_over else 0)


def test_what_is_cached_is_told_and_not_computed() -> None:
    prompt = list(range(5, 305))

    async def main() -> Explanation:
        async with SimCluster(World(1), Shape()) as cluster:
            await output_of(cluster.submit(prompt, 5))
            await cluster.settle()
            stream = cluster.submit(prompt, 5)
            await output_of(stream)
            await cluster.settle()
            return explanations(cluster)[stream.request_id]

    explanation = simulate(main())
    assert_whole(explanation)
    assert explanation.num_cached_tokens > 250
    num_computed = sum(chunk.num_tokens for chunk in explanation.chunks)
    assert num_computed + explanation.num_cached_tokens == len(prompt)


@pytest.mark.parametrize("role", [PrefillRole, DecodeRole])
def test_a_request_that_is_placed_again_is_told_with_both_attempts(role: type) -> None:
    prompt = list(range(5, 705))
    shape = Shape(num_prefill=2, num_decode=2)

    async def main() -> Explanation:
        async with SimCluster(World(2), shape) as cluster:
            stream = cluster.submit(prompt, 60)
            reading = asyncio.create_task(output_of(stream))
            if role is PrefillRole:
                await until(
                    lambda: any(
                        seq.num_computed
                        for w in cluster.of_role(role)
                        for seq in w.role.sequences()
                    )
                )
                victim = stream.timeline.prefill_worker
            else:
                await until(lambda: len(stream.tokens) > 10)
                victim = stream.timeline.decode_worker
            await cluster.kill(next(w for w in cluster.workers if w.config.name == victim))
            assert await reading == mock_output(prompt, 60)
            await cluster.settle()
            return explanations(cluster)[stream.request_id]

    explanation = simulate(main())
    assert_whole(explanation)
    assert explanation.num_attempts == 2
    assert [each.attempt for each in explanation.placements] == [1, 2]
    assert len(explanation.failures) == 1
    attempts = [stage.attempt for stage in explanation.stages if stage.attempt]
    assert attempts == sorted(attempts)
    assert {*attempts} == {1, 2}
    names = [stage.name for stage in explanation.stages]
    assert names.count("retry") == 1
    assert names[-1] == "decode"
    first = {stage.worker for stage in explanation.stages if stage.attempt == 1 and stage.worker}
    last = {stage.worker for stage in explanation.stages if stage.attempt == 2 and stage.worker}
    assert first != last


def test_requests_that_give_way_are_told_so() -> None:
    shape = Shape(num_blocks=24, worker={"max_num_seqs": 8})

    async def main() -> list[Explanation]:
        async with SimCluster(World(3), shape) as cluster:
            prompts = [[5 + index] * 40 for index in range(8)]
            streams = [cluster.submit(prompt, 100) for prompt in prompts]
            await asyncio.gather(*(output_of(stream) for stream in streams))
            await cluster.settle()
            return list(explanations(cluster).values())

    told = simulate(main())
    for explanation in told:
        assert_whole(explanation)
    preempted = [each for each in told if each.num_preemptions]
    assert preempted
    assert all(each.preempted_ms > 0 for each in preempted)
    assert any(
        each.verdict.tpot is not None and each.verdict.tpot.by == "preemption" for each in preempted
    )


def test_a_request_without_an_end_is_told_when_it_is_cancelled() -> None:
    async def main() -> Explanation:
        async with SimCluster(World(1), Shape()) as cluster:
            stream = cluster.submit([5] * 40, 10_000)
            await until(lambda: len(stream.tokens) > 3)
            stream.cancel()
            await cluster.settle()
            return explanations(cluster)[stream.request_id]

    explanation = simulate(main())
    assert_whole(explanation)
    assert explanation.outcome == "cancelled"
    assert explanation.stages[-1].name == "decode"


def test_a_trace_reaches_the_store_and_both_workers() -> None:
    seen: list[Any] = []

    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            for kind in (OpenHandoff, Reserve, Prefill):
                listen(cluster.world.network, kind, lambda _, message: seen.append(message))
            request = GenerationRequest(
                "request-1",
                [5] * 40,
                SamplingParams(max_tokens=3, temperature=0),
                traceparent=TRACEPARENT,
            )
            names: list[dict[str, str]] = []
            listen(
                cluster.world.network,
                Fill,
                lambda _pipe, _message: names.extend(
                    sequence.names for each in cluster.workers for sequence in each.role.sequences()
                ),
            )
            await output_of(cluster.give(cluster.gateways[0], request))
            await cluster.settle()
            assert {each["trace"] for each in names} == {TRACEPARENT[3:35]}
            assert {each["request"] for each in names} == {"request-1"}

    simulate(main())
    assert {type(message) for message in seen} == {OpenHandoff, Reserve, Prefill}
    assert {message.traceparent for message in seen} == {TRACEPARENT}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("seed", [1, 3])
def test_whatever_strikes_all_requests_can_be_told(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Ended] = []
    monkeypatch.setattr(Recent, "add", lambda _, each: ended.append(each))
    report = run_seed(seed)
    assert report.broken == []
    told = [msgspec.json.decode(each.shown(), type=Explanation) for each in ended]
    assert len(told) >= report.outcomes["answered"] > 0
    for explanation in told:
        assert_ordered(explanation)
        placements = [each.attempt for each in explanation.placements]
        assert placements == sorted({1, explanation.num_attempts} - {0})[: len(placements)]
    assert any(explanation.num_attempts > 1 for explanation in told)


def test_what_came_from_the_disk_is_told() -> None:
    block_size = MOCK_LAYOUT.block_size
    shape = Shape(num_blocks=128, disk_bytes=2000 * MOCK_LAYOUT.block_bytes)
    prompts = [[number] * (20 * block_size) + [1] for number in range(5, 25)]

    async def main() -> Explanation:
        async with SimCluster(World(1), shape) as cluster:
            for prompt in (*prompts, prompts[0]):
                stream = cluster.submit(prompt, 3)
                await output_of(stream)
            await cluster.settle()
            return explanations(cluster)[stream.request_id]

    explanation = simulate(main())
    assert_whole(explanation)
    assert explanation.num_cached_tokens == 20 * block_size
    assert explanation.num_loaded_tokens == 20 * block_size
