"""Real processes, each with a port of its own for its metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.processes import Cluster
from tests.ports import free_ports

MOCK: dict[str, Any] = {"engine": "mock", "mock_step_ms": 2, "mover": "zmq"}
ROLES = ("kvstore", "prefill", "decode", "gateway")


def scrape(port: int) -> dict[str, Metric]:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.status_code == 200
    families = list(text_string_to_metric_families(answer.text))
    by_name = {family.name: family for family in families}
    assert len(by_name) == len(families)
    return by_name


def steps(families: dict[str, Metric]) -> dict[str, float]:
    """By worker."""
    samples = families["kvbaton_worker_steps"].samples
    return {sample.labels["worker"]: sample.value for sample in samples}


def test_each_process_shows_its_own_and_the_gateway_all(tmp_path: Path) -> None:
    ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
    with Cluster(tmp_path) as cluster:
        cluster.start("kvstore", kv_bytes="64M", metrics_port=ports["kvstore"])
        for role in ("prefill", "decode"):
            cluster.start(role, metrics_port=ports[role], **MOCK)
        cluster.start("gateway", metrics_port=ports["gateway"])
        cluster.wait_ready(2)
        with cluster.client() as client:
            assert len(list(client.generate("def f", max_tokens=5, temperature=0))) == 5
        own = {role: scrape(ports[role]) for role in ROLES}
        counted = steps(own["prefill"]) | steps(own["decode"])
        assert counted.keys() == {"prefill.1", "decode.1"}
        assert all(counted.values())
        assert "kvbaton_kv_blocks" in own["kvstore"]
        # The gateway hears of it with the next heartbeats; msgpack requests count as HTTP's do.
        for _ in range(100):
            shown = scrape(ports["gateway"])
            if steps(shown) == counted:
                break
            time.sleep(0.1)
        assert steps(shown) == counted
        assert shown.keys() == scrape(cluster.http_port).keys()
        firsts = shown["vllm:time_to_first_token_seconds"].samples
        assert [each.value for each in firsts if each.name.endswith("_count")] == [1]
        assert firsts[0].labels["engine"] == "gateway.1"
