"""What a gateway shows at /metrics beside its own counters: the cluster, as it was told of it."""

from __future__ import annotations

from common.cluster_metrics import StoreRow, WorkerRow, store_families, worker_families
from common.metrics import render
from services.gateway.observe.request_metrics import RequestMetrics
from services.gateway.observe.vllm_metrics import vllm_families
from services.gateway.routing.fleet import Fleet


def cluster_metrics(fleet: Fleet, metrics: RequestMetrics, *, model: str, gateway: str) -> bytes:
    """Workers and stores under our names, and everything under vLLM's."""
    members = list(fleet.workers.values())
    workers = [
        WorkerRow(worker.member.name, worker.member.role, worker.load, worker.counts)
        for worker in members
    ]
    stores = [
        StoreRow(str(store.index), store.blocks, store.handoffs, store.counters)
        for store in fleet.stores
    ]
    layout = next((each.member.layout for each in members), None)
    families = [
        *worker_families(workers),
        *store_families(stores),
        *vllm_families(
            model,
            gateway,
            workers=workers,
            stores=stores,
            layout=layout,
            num_running=metrics.num_running,
        ),
    ]
    return render(families)
