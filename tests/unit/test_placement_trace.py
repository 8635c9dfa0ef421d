"""A part of the Mooncake conversation trace in the simulation of `scripts/bench placement`: the
order of the policies is that of Mooncake's paper, with ours the best."""

from __future__ import annotations

import dataclasses

import pytest

from scripts.benchmarks.placement import replay
from scripts.benchmarks.placement_sim import BASELINES, OURS, Cluster

NUM_REQUESTS = 300
SPEED = 2.0  # so that a part as short as this fills the queues


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, float]]:
    policies = (*BASELINES, OURS, dataclasses.replace(OURS, name="arrival", is_ordered=False))
    return {each.name: replay(Cluster(), each, NUM_REQUESTS, SPEED) for each in policies}


@pytest.mark.parametrize("figure", ["mean_ttft_s", "p90_ttft_s"])
def test_each_policy_is_better_than_the_one_before(
    figures: dict[str, dict[str, float]], figure: str
) -> None:
    order = [figures[name][figure] for name in ("random", "least load", "cache-aware", "ours")]
    assert order == sorted(order, reverse=True)
    assert order[-1] < 0.6 * order[-2]


def test_ours_finds_more_cached_and_gains_by_its_order(
    figures: dict[str, dict[str, float]],
) -> None:
    assert figures["ours"]["cached"] > figures["cache-aware"]["cached"]
    assert figures["ours"]["mean_ttft_s"] < figures["arrival"]["mean_ttft_s"]


def test_a_decode_worker_that_computes_prompts_saves_time_and_keeps_its_target(
    figures: dict[str, dict[str, float]],
) -> None:
    local = dataclasses.replace(OURS, max_local_tokens=1024, tpot_target_s=0.2)
    with_local = replay(Cluster(), local, NUM_REQUESTS, SPEED)
    assert with_local["by_decode"] > 0.05
    assert with_local["mean_ttft_s"] < figures["ours"]["mean_ttft_s"]
    assert with_local["p50_ttft_s"] < figures["ours"]["p50_ttft_s"]
    assert with_local["p99_tpot_s"] < local.tpot_target_s


def test_a_replay_is_the_same_each_time() -> None:
    assert replay(Cluster(), OURS, 50, SPEED) == replay(Cluster(), OURS, 50, SPEED)
