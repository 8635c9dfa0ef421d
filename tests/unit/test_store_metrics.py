"""What the stores report, in Prometheus' text format."""

from __future__ import annotations

from services.gateway.peers import Store
from services.gateway.store_metrics import store_metrics


def test_every_count_is_shown_by_store() -> None:
    first = Store(0, blocks={"free": 3, "cached": 1}, handoffs={"claimed": 2})
    second = Store(1, blocks={"free": 4}, counters={"bytes_in_total": 7.0, "disk_bytes": 5.0})
    assert store_metrics([first, second, Store(2)]).decode().splitlines() == [
        "# TYPE kvbaton_kv_blocks gauge",
        'kvbaton_kv_blocks{state="free",store="0"} 3',
        'kvbaton_kv_blocks{state="cached",store="0"} 1',
        'kvbaton_kv_blocks{state="free",store="1"} 4',
        "# TYPE kvbaton_kv_handoffs gauge",
        'kvbaton_kv_handoffs{state="claimed",store="0"} 2',
        "# TYPE kvbaton_store_bytes_in_total counter",
        'kvbaton_store_bytes_in_total{store="1"} 7.0',
        "# TYPE kvbaton_store_disk_bytes gauge",
        'kvbaton_store_disk_bytes{store="1"} 5.0',
    ]
