"""What a placed request counts for at its workers, and what its store holds by it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.kv.hashing import block_key
from services.gateway.backend import Targets
from services.gateway.routing.peers import Assigned, Store, Worker


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is served; `prefill` is `decode` where that one computes the prompt too.

    `tokens` are those to compute, `keys` of their full blocks; `num_cached` are expected to be in
    the store.
    """

    store: Store
    prefill: Worker
    decode: Worker
    root_key: bytes
    tokens: list[int]
    keys: list[bytes]
    num_cached: int


class Assignment:
    """From when a request is given to its workers until `close`."""

    def __init__(self, place: Place, targets: Targets, now: float) -> None:
        self._place = place
        self._counted = Assigned(len(place.tokens), targets.tpot_ms / 1000 or math.inf)
        place.decode.assigned[self] = self._counted
        for worker in self._workers:
            worker.num_placed += 1
        num_tokens = len(place.tokens) - place.num_cached
        place.prefill.backlog.add(self, num_tokens, place.num_cached, now)

    @property
    def _workers(self) -> dict[Worker, None]:
        return dict.fromkeys((self._place.prefill, self._place.decode))

    def opened(self, num_cached_blocks: int) -> None:
        """The store has told how much of it is cached."""
        self._place.store.prefixes.opened(self._place.keys, num_cached_blocks)

    def prefilled(self, now: float) -> None:
        """The prompt is computed: prefill has done its part."""
        place = self._place
        place.prefill.backlog.remove(self, now)
        self._counted.is_awaited = False
        place.store.prefixes.add(place.keys, [worker.number for worker in self._workers])

    def finished(self, output: list[int]) -> None:
        """The store and decode have the blocks that the output filled, too: the next turn of a
        conversation begins with them."""
        place, layout = self._place, self._place.decode.member.layout
        assert layout is not None
        tokens, size = [*place.tokens, *output], layout.block_size
        parent, added = place.keys[-1] if place.keys else place.root_key, []
        # The last token is never computed.
        for start in range(len(place.keys) * size, len(tokens) - size, size):
            parent = block_key(parent, tokens[start : start + size])
            added.append(parent)
        place.store.prefixes.add(added, [place.decode.number])

    def close(self, now: float) -> None:
        """Nothing of it counts any more."""
        self._place.prefill.backlog.remove(self, now)
        self._place.decode.assigned.pop(self, None)
