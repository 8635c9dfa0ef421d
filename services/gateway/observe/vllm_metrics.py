"""The same numbers under the names that dashboards made for vLLM read.

`engine` names the process that counted: requests are counted by a gateway, steps and transfers by a
worker, blocks by a store. docs/metrics.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from common.cluster_metrics import StoreRow, WorkerRow, add_distribution
from common.kv.layout import KvLayout
from common.metrics import (
    REGISTRY,
    STEP_TOKEN_BUCKETS,
    TRANSFER_BUCKETS_BYTES,
    TRANSFER_BUCKETS_S,
)

_LABELS = ("model_name", "engine")
_RENAMED_LABELS = {"finish_reason": "finished_reason"}
# Ours -> vLLM's, of what this gateway counts.
_RENAMED = {
    "kvbaton_requests_waiting": "num_requests_waiting",
    "kvbaton_prompt_tokens": "prompt_tokens",
    "kvbaton_prompt_tokens_cached": "prompt_tokens_cached",
    "kvbaton_output_tokens": "generation_tokens",
    "kvbaton_request_ends": "request_success",
    "kvbaton_time_to_first_token_seconds": "time_to_first_token_seconds",
    "kvbaton_inter_token_latency_seconds": "inter_token_latency_seconds",
    "kvbaton_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "kvbaton_request_latency_seconds": "e2e_request_latency_seconds",
    "kvbaton_request_queue_seconds": "request_queue_time_seconds",
    "kvbaton_request_prefill_seconds": "request_prefill_time_seconds",
    "kvbaton_request_decode_seconds": "request_decode_time_seconds",
    "kvbaton_request_inference_seconds": "request_inference_time_seconds",
    "kvbaton_request_prompt_tokens": "request_prompt_tokens",
    "kvbaton_request_output_tokens": "request_generation_tokens",
    "kvbaton_request_n": "request_params_n",
    "kvbaton_request_max_tokens": "request_params_max_tokens",
}


def vllm_families(
    model: str,
    gateway: str,
    *,
    workers: Sequence[WorkerRow],
    stores: Sequence[StoreRow],
    layout: KvLayout | None,
    num_running: int,
) -> Iterator[Metric]:
    """All that docs/metrics.md lists. `gateway` names this process, which has `num_running`
    requests at their workers."""
    families = {family.name: family for family in REGISTRY.collect()}
    own = {_LABELS[0]: model, _LABELS[1]: gateway}
    for ours, theirs in _RENAMED.items():
        yield _renamed(families[ours], theirs, own)
    yield _gauge("num_requests_running", "Requests at their workers", [model, gateway], num_running)
    yield from _of_caches(families, [model, gateway])
    rows = list({row.name: row for row in workers}.values())
    yield from _of_workers(model, rows)
    yield from _of_stores(model, stores, layout)


def _renamed(family: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    renamed = Metric(f"vllm:{name}", family.documentation, family.type)
    for sample in family.samples:
        name = renamed.name + sample.name.removeprefix(family.name)
        more = {_RENAMED_LABELS.get(key, key): value for key, value in sample.labels.items()}
        renamed.add_sample(name, {**labels, **more}, sample.value)
    return renamed


def _of_caches(families: Mapping[str, Metric], labels: list[str]) -> Iterator[Metric]:
    """vLLM's two kinds of cache: in memory, and what a connector has beside it, here the disk."""

    def value(name: str) -> float:
        return families[name].samples[0].value

    asked, loaded = value("kvbaton_prompt_tokens"), value("kvbaton_prompt_tokens_loaded")
    in_memory = value("kvbaton_prompt_tokens_cached") - loaded
    for name, what, tokens in (
        ("prefix_cache_queries", "Prompt tokens looked for in memory", asked),
        ("prefix_cache_hits", "Prompt tokens found in memory", in_memory),
        ("external_prefix_cache_queries", "Prompt tokens not found there", asked - in_memory),
        ("external_prefix_cache_hits", "Of those, found on a store's disk", loaded),
    ):
        counter = CounterMetricFamily(f"vllm:{name}", what, labels=_LABELS)
        counter.add_metric(labels, tokens)
        yield counter


def _gauge(name: str, what: str, labels: list[str], value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"vllm:{name}", what, labels=_LABELS)
    gauge.add_metric(labels, value)
    return gauge


def _of_workers(model: str, rows: Sequence[WorkerRow]) -> Iterator[Metric]:
    for name, what, counts in (
        (
            "num_preemptions",
            "Sequences that gave way to others",
            [row.counts.num_preemptions for row in rows],
        ),
        (
            "nixl_num_failed_transfers",
            "Transfers of KV that failed",
            [row.counts.num_transfers_failed for row in rows],
        ),
    ):
        counter = CounterMetricFamily(f"vllm:{name}", what, labels=_LABELS)
        for row, count in zip(rows, counts, strict=True):
            counter.add_metric([model, row.name], count)
        yield counter
    for name, what, bounds, values in (
        (
            "iteration_tokens_total",
            "Tokens computed in a step",
            STEP_TOKEN_BUCKETS,
            [row.counts.step_tokens for row in rows],
        ),
        (
            "nixl_bytes_transferred",
            "KV bytes of a transfer",
            TRANSFER_BUCKETS_BYTES,
            [row.counts.transfer_bytes for row in rows],
        ),
        (
            "nixl_xfer_time_seconds",
            "Time of a transfer of KV",
            TRANSFER_BUCKETS_S,
            [row.counts.transfer_s for row in rows],
        ),
    ):
        histogram = HistogramMetricFamily(f"vllm:{name}", what, labels=_LABELS)
        for row, distribution in zip(rows, values, strict=True):
            add_distribution(histogram, [model, row.name], distribution, bounds)
        yield histogram


def _of_stores(model: str, stores: Sequence[StoreRow], layout: KvLayout | None) -> Iterator[Metric]:
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "Share of KV blocks that requests hold", labels=_LABELS
    )
    config_labels = (*_LABELS, "block_size", "num_gpu_blocks", "cache_dtype")
    config = GaugeMetricFamily("vllm:cache_config_info", "How KV is laid out", labels=config_labels)
    for store in stores:
        num_blocks = sum(store.blocks.values())
        if not num_blocks:
            continue
        num_idle = store.blocks.get("free", 0) + store.blocks.get("cached", 0)
        labels = [model, f"store-{store.name}"]
        usage.add_metric(labels, 1 - num_idle / num_blocks)
        if layout is not None:
            shape = [str(layout.block_size), str(num_blocks), layout.dtype]
            config.add_metric([*labels, *shape], 1)
    yield usage
    yield config
