"""What workers and stores tell, in Prometheus' text format, under our names and under vLLM's."""

from __future__ import annotations

import math
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from common.cluster_metrics import StoreRow, WorkerRow, store_families, worker_families
from common.kv.layout import KvLayout
from common.messages import Distribution, Load, WorkerCounts
from common.metrics import render
from services.gateway.observe.request_metrics import RequestMetrics
from services.gateway.observe.vllm_metrics import vllm_families

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="bfloat16")
STORES = [
    StoreRow("0", {"free": 2, "cached": 1, "committed": 1}, {"claimed": 2}, {}),
    StoreRow("1", {"free": 4}, {}, {"bytes_in_total": 7.0, "disk_bytes": 5.0}),
    StoreRow("2", {}, {}, {}),
]


def worker(name: str = "decode.1", **counts: Any) -> WorkerRow:
    return WorkerRow(name, name.partition(".")[0], Load(num_running=3), WorkerCounts(**counts))


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and the values of the labels, which are in alphabetical order."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_every_count_of_a_store_is_shown_by_store() -> None:
    assert samples(render(store_families(STORES))) == {
        ("kvbaton_kv_blocks", ("free", "0")): 2,
        ("kvbaton_kv_blocks", ("cached", "0")): 1,
        ("kvbaton_kv_blocks", ("committed", "0")): 1,
        ("kvbaton_kv_blocks", ("free", "1")): 4,
        ("kvbaton_kv_handoffs", ("claimed", "0")): 2,
        ("kvbaton_store_bytes_in_total", ("1",)): 7,
        ("kvbaton_store_disk_bytes", ("1",)): 5,
    }


def test_load_and_counts_of_each_worker_are_shown() -> None:
    found = samples(render(worker_families([worker(num_preemptions=2), worker("prefill.1")])))
    labels = ("decode", "decode.1")
    assert found["kvbaton_worker_sequences_running", labels] == 3
    assert found["kvbaton_worker_preemptions_total", labels] == 2
    assert found["kvbaton_worker_preemptions_total", ("prefill", "prefill.1")] == 0


def test_of_two_workers_by_one_name_the_later_is_shown() -> None:
    """Prometheus takes no scrape that has a line twice."""
    lines = render(worker_families([worker(num_preemptions=2), worker(num_preemptions=5)]))
    shown = [line for line in lines.splitlines() if line.startswith(b"kvbaton_worker_preemptions")]
    assert [float(line.split()[-1]) for line in shown] == [5]


def test_buckets_add_up_from_below() -> None:
    row = worker()
    row.counts.step(1, 0.1)
    row.counts.step(3, 0.1)
    row.counts.step(10**6, 0.1)
    found = samples(render(worker_families([row])))
    buckets = [
        (float(labels[0]), value)
        for (name, labels), value in found.items()
        if name == "kvbaton_worker_step_tokens_bucket"
    ]
    counts = dict(buckets)
    assert [counts[bound] for bound in (1, 2, 4, 16384, math.inf)] == [1, 1, 2, 2, 3]
    assert found["kvbaton_worker_step_tokens_sum", ("decode", "decode.1")] == 10**6 + 4


def test_what_was_counted_with_other_buckets_is_left_out() -> None:
    """By a worker of another version."""
    row = worker()
    row.counts.step_tokens = Distribution(counts=[7, 7], total=0.0)
    found = samples(render(worker_families([row])))
    assert found["kvbaton_worker_step_tokens_count", ("decode", "decode.1")] == 0


def test_vllms_names_say_who_counted() -> None:
    rows = [worker(num_preemptions=4, num_transfers_failed=1), worker("prefill.1")]
    metrics = RequestMetrics(lambda request: request.targets)
    families = list(
        vllm_families(
            "demo",
            "gateway.1",
            workers=rows,
            stores=STORES,
            layout=LAYOUT,
            num_running=metrics.num_running,
        )
    )
    found = samples(render(families))
    assert found["vllm:num_preemptions_total", ("decode.1", "demo")] == 4
    assert found["vllm:nixl_num_failed_transfers_total", ("decode.1", "demo")] == 1
    assert found["vllm:iteration_tokens_total_count", ("prefill.1", "demo")] == 0
    assert found["vllm:kv_cache_usage_perc", ("store-0", "demo")] == 0.25
    assert found["vllm:kv_cache_usage_perc", ("store-1", "demo")] == 0
    config = [labels for name, labels in found if name == "vllm:cache_config_info"]
    assert [set(labels) for labels in config] == [
        {"demo", "store-0", "16", "4", "bfloat16"},
        {"demo", "store-1", "16", "4", "bfloat16"},
    ]
    assert found["vllm:num_requests_running", ("gateway.1", "demo")] == 0
    assert ("vllm:time_to_first_token_seconds_count", ("gateway.1", "demo")) in found
    assert len({family.name for family in families}) == len(families)
