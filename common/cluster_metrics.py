"""What workers and stores tell of themselves, for Prometheus: each shows its own, and a gateway
shows those of all that it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from common.messages import Distribution, Load, WorkerCounts
from common.metrics import STEP_TOKEN_BUCKETS, TRANSFER_BUCKETS_BYTES, TRANSFER_BUCKETS_S


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as it told of itself last."""

    name: str
    role: str
    load: Load
    counts: WorkerCounts


@dataclass(frozen=True, slots=True)
class StoreRow:
    """A store as it told of itself last; `counters` that end with _total only grow."""

    name: str
    blocks: Mapping[str, int]
    handoffs: Mapping[str, int]
    counters: Mapping[str, float]


_WORKER_GAUGES: Mapping[str, tuple[str, Callable[[WorkerRow], float]]] = {
    "sequences_running": ("Sequences that have a place", lambda row: row.load.num_running),
    "sequences_waiting": ("Sequences that wait for one", lambda row: row.load.num_waiting),
    "tokens_queued": ("Prompt tokens not yet computed", lambda row: row.load.num_tokens_queued),
    "tokens_per_second": ("Mean rate while it computes", lambda row: row.load.tokens_per_s),
    "draining": ("Whether it takes nothing new", lambda row: row.load.is_draining),
}
_WORKER_COUNTERS: Mapping[str, tuple[str, Callable[[WorkerCounts], float]]] = {
    "steps": ("Steps of the engine", lambda counts: counts.num_steps),
    "step_seconds": ("Time that they took", lambda counts: counts.step_s),
    "busy_seconds": ("Time in which there was a step to run", lambda counts: counts.busy_s),
    "arithmetic_seconds": ("Time in which the model computed", lambda counts: counts.arithmetic_s),
    "preemptions": ("Sequences that gave way to others", lambda counts: counts.num_preemptions),
    "messages_refused": (
        "Messages that their sender had no right to",
        lambda counts: counts.num_messages_refused,
    ),
    "transfers_failed": ("Transfers that failed", lambda counts: counts.num_transfers_failed),
    "device_blocks": (
        "KV blocks copied into a GPU's memory when they were granted or handed over",
        lambda counts: counts.num_device_blocks,
    ),
    "neighbour_blocks": (
        "Of these, from the memory of another worker on the same GPU",
        lambda counts: counts.num_neighbour_blocks,
    ),
}
_WORKER_HISTOGRAMS: Mapping[
    str, tuple[str, Sequence[float], Callable[[WorkerCounts], Distribution]]
] = {
    "step_tokens": (
        "Tokens computed in a step", STEP_TOKEN_BUCKETS, lambda counts: counts.step_tokens
    ),
    "transfer_bytes": (
        "KV bytes of a transfer", TRANSFER_BUCKETS_BYTES, lambda counts: counts.transfer_bytes
    ),
    "transfer_seconds": (
        "Time of a transfer", TRANSFER_BUCKETS_S, lambda counts: counts.transfer_s
    ),
}  # fmt: skip


def worker_families(workers: Iterable[WorkerRow]) -> Iterator[Metric]:
    """Each worker's load and counts. Of several by one name the last one is shown."""
    rows = list({row.name: row for row in workers}.values())
    labels = ["worker", "role"]
    for name, (what, gauge_of) in _WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(f"kvbaton_worker_{name}", what, labels=labels)
        for row in rows:
            gauge.add_metric([row.name, row.role], float(gauge_of(row)))
        yield gauge
    for name, (what, count_of) in _WORKER_COUNTERS.items():
        counter = CounterMetricFamily(f"kvbaton_worker_{name}", what, labels=labels)
        for row in rows:
            counter.add_metric([row.name, row.role], count_of(row.counts))
        yield counter
    for name, (what, bounds, values_of) in _WORKER_HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"kvbaton_worker_{name}", what, labels=labels)
        for row in rows:
            add_distribution(histogram, [row.name, row.role], values_of(row.counts), bounds)
        yield histogram


def add_distribution(
    histogram: HistogramMetricFamily,
    labels: Sequence[str],
    values: Distribution,
    bounds: Sequence[float],
) -> None:
    """Add what was counted with these bounds; what was counted with others is left out."""
    counts = values.counts if len(values.counts) == len(bounds) + 1 else [0] * (len(bounds) + 1)
    buckets, num_below = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        num_below += count
        buckets.append((floatToGoString(bound), num_below))  # type: ignore[no-untyped-call]
    histogram.add_metric(labels, buckets, values.total)


def store_families(stores: Sequence[StoreRow]) -> Iterator[Metric]:
    """Blocks and handoffs by state, and the stores' own counters, each by store."""
    for name, what, counts_of in (
        ("kvbaton_kv_blocks", "KV blocks by state", [store.blocks for store in stores]),
        ("kvbaton_kv_handoffs", "Handoffs by state", [store.handoffs for store in stores]),
    ):
        gauge = GaugeMetricFamily(name, what, labels=["state", "store"])
        for store, counts in zip(stores, counts_of, strict=True):
            for state, count in counts.items():
                gauge.add_metric([state, store.name], count)
        yield gauge
    for counter in dict.fromkeys(name for store in stores for name in store.counters):
        kind = CounterMetricFamily if counter.endswith("_total") else GaugeMetricFamily
        words = counter.removesuffix("_total").replace("_", " ")
        family = kind(f"kvbaton_store_{counter}", f"A store's {words}", labels=["store"])
        for store in stores:
            if counter in store.counters:
                family.add_metric([store.name], store.counters[counter])
        yield family
