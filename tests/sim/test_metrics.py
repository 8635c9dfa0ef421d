"""A simulated cluster's scrape: valid, whole, and what the dashboard asks for is in it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import services.gateway.http.face  # noqa: F401 - a gateway's scrape has its counters too
from common.metrics import exposition
from services.gateway.observe.metrics import cluster_metrics
from tests.sim.cluster import HEARTBEAT_S, Shape, SimCluster, output_of, simulate
from tests.sim.gateway import SimGateway
from tests.sim.world import World

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "scripts" / "grafana" / "kvbaton.json"
ALARMS = ROOT / "scripts" / "prometheus" / "kvbaton.yml"
OPERATIONS = ROOT / "docs" / "operations.md"
# What dashboards, routers and benchmark clients made for vLLM read, with the kinds they expect.
VLLM = {
    "gauge": {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
              "cache_config_info"},
    "counter": {"prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries",
                "external_prefix_cache_hits", "prompt_tokens", "prompt_tokens_cached",
                "generation_tokens", "request_success", "num_preemptions",
                "nixl_num_failed_transfers"},
    "histogram": {"time_to_first_token_seconds", "inter_token_latency_seconds",
                  "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
                  "request_queue_time_seconds", "request_prefill_time_seconds",
                  "request_decode_time_seconds", "request_inference_time_seconds",
                  "request_prompt_tokens", "request_generation_tokens", "request_params_n",
                  "request_params_max_tokens", "iteration_tokens_total",
                  "nixl_bytes_transferred", "nixl_xfer_time_seconds"},
}  # fmt: skip
Families = dict[str, Metric]


def scrape(gateway: SimGateway) -> Families:
    """As GET /metrics shows it, read as Prometheus reads it. Each name is there once."""
    dispatcher = gateway.dispatcher
    shown = cluster_metrics(
        dispatcher.fleet, dispatcher.metrics, model="demo", gateway=gateway.name
    )
    families = list(text_string_to_metric_families((exposition() + shown).decode()))
    by_name = {family.name: family for family in families}
    assert len(by_name) == len(families)
    return by_name


def total(families: Families, name: str, suffix: str = "_total") -> float:
    return sum(s.value for s in families[name].samples if s.name == name + suffix)


def served(check: Callable[[SimCluster], None], **values: object) -> None:
    """Have a cluster that moves blocks serve requests, and look at it after some heartbeats."""

    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, num_gateways=2, mover="zmq", **values)  # type: ignore[arg-type]
        async with SimCluster(World(1), shape) as cluster:
            streams = [cluster.submit([5 + index] * 40, 60) for index in range(8)]
            await asyncio.gather(*(output_of(stream) for stream in streams))
            await asyncio.sleep(3 * HEARTBEAT_S)
            check(cluster)

    simulate(main())


def test_all_that_dashboards_for_vllm_read_is_there() -> None:
    def check(cluster: SimCluster) -> None:
        families = scrape(cluster.gateways[0])
        for kind, names in VLLM.items():
            for name in names:
                family = families[f"vllm:{name}"]
                assert family.type == kind, name
                assert family.samples, name
                for sample in family.samples:
                    assert sample.labels["model_name"] == "demo"
                    assert sample.labels["engine"]
        ends = families["vllm:request_success"].samples
        reasons = {sample.labels["finished_reason"] for sample in ends}
        assert reasons == {"stop", "length", "abort", "error"}

    served(check)


def test_every_name_in_the_dashboard_is_in_a_scrape() -> None:
    text = DASHBOARD.read_text()
    panels = json.loads(text)["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    names = set(re.findall(r"\b(?:kvbaton_|vllm:)\w+", " ".join(asked) + ALARMS.read_text()))
    assert len(names) > 30

    def check(cluster: SimCluster) -> None:
        families = scrape(cluster.gateways[0])
        # A counter with labels has a line of its kind, and none of its own before it counts.
        shown = {sample.name for family in families.values() for sample in family.samples}
        shown |= {f"{name}_total" for name, family in families.items() if family.type == "counter"}
        shown |= {f"kvbaton_gateway_{name}" for name in cluster.gateways[0].dispatcher.stats()}
        assert names - shown == {"kvbaton_store_disk_is_failing"}  # there is no disk here

    served(check)


def test_operators_are_told_what_to_do_at_each_alarm() -> None:
    alarms = re.findall(r"alert: (\w+)", ALARMS.read_text())
    told = re.findall(r"^\| `(Kvbaton\w+)` \|", OPERATIONS.read_text(), re.MULTILINE)
    assert len(alarms) > 10
    assert told == alarms


def test_what_workers_count_arrives_at_every_gateway() -> None:
    def check(cluster: SimCluster) -> None:
        first, second = [scrape(gateway) for gateway in cluster.gateways]
        num_tokens = sum(worker.num_tokens_computed for worker in cluster.workers)
        movers = [store.mover for worker in cluster.workers for store in worker.stores]
        num_bytes = sum(mover.num_bytes_moved for mover in movers)
        for families in (first, second):
            assert total(families, "kvbaton_worker_step_tokens", "_sum") == num_tokens > 0
            assert total(families, "kvbaton_worker_transfer_bytes", "_sum") == num_bytes > 0
            assert total(families, "vllm:nixl_bytes_transferred", "_sum") == num_bytes
            assert total(families, "vllm:iteration_tokens_total", "_sum") == num_tokens
            assert total(families, "kvbaton_worker_transfer_seconds", "_count") > 0
        assert total(first, "kvbaton_worker_preemptions") > 0

    served(check, num_blocks=32, worker={"max_num_seqs": 8})


def test_each_process_shows_its_own() -> None:
    def check(cluster: SimCluster) -> None:
        for worker in cluster.workers:
            families = {
                family.name: family
                for family in text_string_to_metric_families(worker.metrics().decode())
            }
            steps = families["kvbaton_worker_steps"].samples
            assert [sample.labels["worker"] for sample in steps] == [worker.config.name]
            assert steps[0].value == worker.counts().num_steps
            counts = worker.counts()
            # Nothing but the engine takes virtual time.
            assert counts.busy_s == counts.step_s > 0
            assert counts.arithmetic_s == pytest.approx(counts.step_s)
        (store,) = cluster.stores
        text = store.news.metrics().decode()
        blocks = {family.name: family for family in text_string_to_metric_families(text)}
        held = blocks["kvbaton_kv_blocks"].samples
        assert sum(sample.value for sample in held) == cluster.shape.num_blocks

    served(check)
