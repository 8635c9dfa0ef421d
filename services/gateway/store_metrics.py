"""What each KV store reports of itself, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.gateway.peers import Store


def store_metrics(stores: Sequence[Store]) -> bytes:
    """Blocks and handoffs by state, and the stores' own counters, each by store."""
    return "".join(_lines(stores)).encode()


def _lines(stores: Sequence[Store]) -> Iterator[str]:
    for name, by_state in (
        ("kvbaton_kv_blocks", [store.blocks for store in stores]),
        ("kvbaton_kv_handoffs", [store.handoffs for store in stores]),
    ):
        yield f"# TYPE {name} gauge\n"
        for store, counts in zip(stores, by_state, strict=True):
            for state, count in counts.items():
                yield f'{name}{{state="{state}",store="{store.index}"}} {count}\n'
    for counter in dict.fromkeys(name for store in stores for name in store.counters):
        kind = "counter" if counter.endswith("_total") else "gauge"
        yield f"# TYPE kvbaton_store_{counter} {kind}\n"
        for store in stores:
            if counter in store.counters:
                value = store.counters[counter]
                yield f'kvbaton_store_{counter}{{store="{store.index}"}} {value}\n'
