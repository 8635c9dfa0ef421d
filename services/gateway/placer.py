"""Where in the fleet a request can be served now, and the wait until it can be."""

from __future__ import annotations

import asyncio
import contextlib
import math

from common.seams import Clock
from kvbaton.errors import UnavailableError
from services.gateway.attempt import Place
from services.gateway.fleet import Fleet
from services.gateway.peers import Placeable, Store, Worker
from services.gateway.placement import (
    choose_colocated,
    choose_decode,
    choose_prefill,
    choose_shard,
)
from services.gateway.stream import RequestStream


class Placer:
    """Applies placement.py to the live fleet of one gateway."""

    def __init__(self, fleet: Fleet, clock: Clock, mode: str) -> None:
        self._fleet = fleet
        self._clock = clock
        self._mode = mode
        self._unready_since: float | None = -math.inf
        self._news = asyncio.Event()  # set when who can take work changes, and replaced

    @property
    def is_ready(self) -> bool:
        return any(self.has_workers(store) for store in self._fleet.stores)

    @property
    def unready_s(self) -> float:
        """For how long nothing could have been served; 0 if it could be now."""
        return 0.0 if self._unready_since is None else self._clock.now() - self._unready_since

    def has_workers(self, store: Store) -> bool:
        """Whether a request can be served with this store."""
        roles = ("decode",) if self._mode == "colocated" else ("prefill", "decode")
        return store.is_up and all(self._fleet.of_role(role, store) for role in roles)

    def on_news(self) -> None:
        """Who can take work has changed."""
        if self.is_ready:
            self._unready_since = None
        elif self._unready_since is None:
            self._unready_since = self._clock.now()
        self._news.set()
        self._news = asyncio.Event()

    def unavailable(self) -> UnavailableError:
        """What is missing, in words."""
        for store in self._fleet.stores:
            if not store.is_up:
                return UnavailableError("the KV store cannot be reached", retry_after_s=1)
        roles = [worker.member.role for worker in self._fleet.workers.values()]
        missing = "decode" if "decode" not in roles else "prefill"
        return UnavailableError(f"no {missing} worker is alive", retry_after_s=1)

    async def wait(self, stream: RequestStream, tried: set[Worker], patience_s: float) -> Place:
        """Where to serve a request, once that is possible; workers in `tried` come last. Raises
        UnavailableError after `patience_s`."""
        until = self._clock.now() + patience_s
        while True:
            news = self._news
            try:
                return self._place(stream, tried)
            except UnavailableError:
                left_s = until - self._clock.now()
                if left_s <= 0:
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), left_s)

    def _place(self, stream: RequestStream, tried: set[Worker]) -> Place:
        stores = [store for store in self._fleet.stores if self.has_workers(store)]
        if not stores:
            raise self.unavailable()
        layout = self._fleet.of_role("decode", stores[0])[0].member.layout
        assert layout is not None
        first_block = stream.request.prompt[: layout.block_size]
        store = self._fleet.stores[choose_shard(first_block, [store.index for store in stores])]
        num_tokens = len(stream.request.prompt) + len(stream.tokens)
        decodes = self._candidates("decode", store, tried)
        if self._mode == "colocated":
            worker = choose_colocated(decodes, num_tokens).worker
            return Place(store, worker, worker)
        prefill = choose_prefill(self._candidates("prefill", store, tried), num_tokens)
        return Place(store, prefill.worker, choose_decode(decodes).worker)

    def _candidates(self, role: str, store: Store, tried: set[Worker]) -> list[Placeable]:
        workers = self._fleet.of_role(role, store)
        fresh = [worker for worker in workers if worker not in tried]
        return [worker.candidate() for worker in fresh or workers]
