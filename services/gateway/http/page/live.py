"""GET /debug/live: how the cluster is now, as this gateway knows it."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvbaton.errors import ForbiddenError
from services.gateway.observe.request_metrics import Percentiles, RequestMetrics
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.peers import Store, Worker


class WorkerState(msgspec.Struct, frozen=True):
    """A worker. `state`: ready, draining, or lost, which it may come back from."""

    name: str
    role: str
    state: str
    running: int
    waiting: int
    places: int
    tokens_queued: int
    tokens_per_s: float


class StoreState(msgspec.Struct, frozen=True):
    """A store: its blocks and its handoffs by state."""

    name: str
    is_up: bool
    blocks: dict[str, int]
    handoffs: dict[str, int]
    waiting: int


class Requests(msgspec.Struct, frozen=True):
    """Of this gateway: at their workers, not yet there, over, and the tokens made for all."""

    running: int
    waiting: int
    ended: int
    tokens: int


class State(msgspec.Struct, frozen=True):
    """All of it."""

    gateway: str
    model: str
    requests: Requests
    ttft: Percentiles | None
    tpot: Percentiles | None
    workers: list[WorkerState]
    stores: list[StoreState]


class Live:
    """The handler. Tells about all tenants, so it is for operators."""

    def __init__(self, fleet: Fleet, metrics: RequestMetrics, *, gateway: str, model: str) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._gateway = gateway
        self._model = model

    def route(self) -> Route:
        """Where it is asked for."""
        return Route("/debug/live", self._show, methods=["GET"])

    def state(self) -> State:
        """How it is now."""
        counts = self._metrics
        workers = sorted(self._fleet.workers.values(), key=_order)
        return State(
            gateway=self._gateway,
            model=self._model,
            requests=Requests(
                running=counts.num_running,
                waiting=counts.num_waiting,
                ended=counts.num_ended,
                tokens=counts.num_tokens,
            ),
            ttft=counts.ttft(),
            tpot=counts.tpot(),
            workers=[_worker(worker) for worker in workers],
            stores=[_store(store) for store in self._fleet.stores],
        )

    async def _show(self, request: Request) -> Response:
        if not request.state.caller.is_operator:
            raise ForbiddenError("this tells about all tenants: it needs an operator's key")
        body = msgspec.json.encode(self.state())
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _order(worker: Worker) -> tuple[int, str]:
    """decode.2 before decode.10."""
    return len(worker.member.name), worker.member.name


def _worker(worker: Worker) -> WorkerState:
    load = worker.load
    state = "lost" if worker.is_lost else "draining" if load.is_draining else "ready"
    return WorkerState(
        name=worker.member.name,
        role=worker.member.role,
        state=state,
        running=load.num_running,
        waiting=load.num_waiting,
        places=worker.member.max_num_seqs,
        tokens_queued=load.num_tokens_queued,
        tokens_per_s=load.tokens_per_s,
    )


def _store(store: Store) -> StoreState:
    return StoreState(
        name=str(store.index),
        is_up=store.is_up,
        blocks=store.blocks,
        handoffs=store.handoffs,
        waiting=store.num_waiting,
    )
