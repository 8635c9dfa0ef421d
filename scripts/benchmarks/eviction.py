"""Block hit rates of orders of eviction: the Mooncake conversation trace, replayed through the
store's own block pool, alone and amid a flood of prompts that never come again.

Figures depend on the trace alone, not on this machine.
"""

# ruff: noqa: ARG002 - an order need not use all that it is told

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterable

from scripts.benchmarks.report import Report
from scripts.benchmarks.trace import Request, conversation_trace, flooded, hit_rate
from services.kvstore.eviction import EvictionOrder, Order

_SIZES = (2_000, 5_859, 25_000, 97_656, 200_000)  # the last holds the whole trace
_FLOOD_SIZE = 5_859


class LruOrder:
    """Least recently used first."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(
        self, block: int, tenant: bytes, *, key: bytes | None = None, cold: bool = False
    ) -> None:
        """See Order."""
        self._blocks[block] = None
        if cold:
            self._blocks.move_to_end(block, last=False)

    def remove(self, block: int) -> None:
        """See Order."""
        del self._blocks[block]

    def victim(self, is_leaf: Callable[[int], bool]) -> int:
        """See Order. In this order leaves come before their parents anyway."""
        return self._blocks.popitem(last=False)[0]

    def coldest(self, count: int) -> list[int]:
        """See Order."""
        return list(self._blocks)[:count]


class TwoQueues(LruOrder):
    """2Q: what is new waits in a short queue; what was seen before goes to the long one, by LRU."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._num_new = num_blocks // 20
        self._num_seen = 4 * num_blocks
        self._new: OrderedDict[int, None] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks) + len(self._new)

    def add(
        self, block: int, tenant: bytes, *, key: bytes | None = None, cold: bool = False
    ) -> None:
        """See Order."""
        assert key is not None
        is_seen = key in self._seen
        self._seen.pop(key, None)
        self._keys[block] = key
        (self._blocks if is_seen else self._new)[block] = None

    def remove(self, block: int) -> None:
        """See Order."""
        (self._blocks if block in self._blocks else self._new).pop(block)
        self._seen[self._keys.pop(block)] = None
        if len(self._seen) > self._num_seen:
            self._seen.popitem(last=False)

    def victim(self, is_leaf: Callable[[int], bool]) -> int:
        """See Order."""
        is_new_first = self._new and (len(self._new) > self._num_new or not self._blocks)
        block = next(iter(self._new if is_new_first else self._blocks))
        self.remove(block)
        return block


class UnsharedOrder(EvictionOrder):
    """The store's order without the tenants' shares."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, tenant_share=1.0)


_ORDERS: dict[str, Callable[[int], Order]] = {
    "LRU": LruOrder,
    "2Q": TwoQueues,
    "the store's": EvictionOrder,
}
_FLOOD_ORDERS: dict[str, Callable[[int], Order]] = {
    "LRU": LruOrder,
    "2Q": TwoQueues,
    "the store's, no shares": UnsharedOrder,
    "the store's": EvictionOrder,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--sizes", type=int, nargs="+", default=_SIZES, metavar="N")
    parser.add_argument("--flood", type=int, default=5, metavar="N", help="prompts to each request")
    parser.add_argument(
        "--flood-requests", type=int, default=4000, metavar="N", help="of the trace, amid the flood"
    )


def run(options: argparse.Namespace) -> Report:
    """Replay."""
    trace = conversation_trace()
    report = Report("eviction", {"trace": "Mooncake conversation", "requests": len(trace)})
    rates = {
        name: [hit_rate(size, make(size), trace) for size in options.sizes]
        for name, make in _ORDERS.items()
    }
    columns = ("order", *(f"{size:,}" for size in options.sizes))
    report.table("block hit rate by blocks of 512 tokens", columns, _rows(rates))
    some = trace[: options.flood_requests]
    kinds: dict[str, Callable[[], Iterable[Request]]] = {
        "no flood": lambda: some,
        "of another tenant": lambda: flooded(some, options.flood),
        "of the same tenant": lambda: flooded(some, options.flood, some[0].tenant),
    }
    amid = {
        name: [hit_rate(_FLOOD_SIZE, make(_FLOOD_SIZE), kind()) for kind in kinds.values()]
        for name, make in _FLOOD_ORDERS.items()
    }
    title = f"{len(some):,} requests, {options.flood} of a flood to each, {_FLOOD_SIZE:,} blocks"
    report.table(title, ("order", *kinds), _rows(amid))
    report.figures.update(sizes=options.sizes, hit_rates=rates, flood_hit_rates=amid)
    return report


def _rows(rates: dict[str, list[float]]) -> list[tuple[str, ...]]:
    return [(name, *(f"{rate:.4f}" for rate in row)) for name, row in rates.items()]
