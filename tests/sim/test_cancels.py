"""Cancels at every transition: nothing is left, nothing grows, and who asks next is served.

Each request is cancelled at a point that is named in advance: when the message that marks it is
delivered. What the store hears of it comes a moment later, as it would.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import (
    AbortHandoff,
    Claim,
    Commit,
    Fill,
    GetBlocks,
    HandoffOpened,
    Message,
    OpenHandoff,
    OutputTokens,
    Prefill,
    PutBlocks,
    Release,
    Reserve,
    Seal,
    Suspend,
)
from services.gateway.routing.stream import RequestStream
from services.kvstore.handoff import Handoff
from tests.sim.cluster import Shape, SimCluster, output_of, simulate
from tests.sim.farm import asked_for, farmed
from tests.sim.load import mock_agrees
from tests.sim.network import Pipe, decoded, type_of
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size
NUM_CANCELS = 10_000  # at least, over all shapes and points
_NUM_CLIENTS = 24


def _is_partial(commit: Commit, handoff: Handoff) -> bool:
    return commit.first_index + len(commit.blocks) < len(handoff.keys)


# The message that marks a point, and what else must hold of it (of each token) and its handoff. The
# two that wait are told apart once the store has taken the message.
POINTS: dict[str, tuple[type[Message], Callable[[Any, Handoff], bool]]] = {
    "opened": (HandoffOpened, lambda opened, _: opened.epoch == 1),
    "reserving a place": (Reserve, lambda *_: True),
    "asked to fill": (Prefill, lambda *_: True),
    "filling": (Fill, lambda *_: True),
    "pushing": (PutBlocks, lambda *_: True),
    "between chunks": (Commit, _is_partial),
    "first token out": (OutputTokens, lambda token, _: token.index == 0),
    "sealing": (Seal, lambda *_: True),
    "pulling": (GetBlocks, lambda *_: True),
    "claiming": (Claim, lambda *_: True),
    "decoding": (OutputTokens, lambda token, _: token.index > 1),
    "suspended": (Suspend, lambda *_: True),
    "releasing": (Release, lambda *_: True),
}
WAITING, LOADING = "waiting for room", "loading from disk"
_KINDS: list[type[Message]] = [OpenHandoff, AbortHandoff, *(kind for kind, _ in POINTS.values())]
_BY_TAG = {kind.__struct_config__.tag: kind for kind in _KINDS}


@dataclass(frozen=True)
class Scene:
    """A cluster in which these points come."""

    shape: Shape
    points: tuple[str, ...]
    states: tuple[str, ...]  # in which the store must have heard of a cancel
    prompt_tokens: tuple[int, int] = (33, 90)
    num_tokens: tuple[int, int] = (4, 8)
    num_prompts: int = 1_000_000  # different ones
    disk_is_slow: bool = False


_STEPS = {"max_num_batched_tokens": 32, "max_num_seqs": 8}
_SPLIT = (
    "opened", "reserving a place", "asked to fill", "filling", "between chunks", "first token out",
    "sealing", "claiming", "decoding", "releasing",
)  # fmt: skip
_SPLIT_STATES = ("reserved", "filling", "sealed", "claimed", "over")
SCENES = {
    "shm": Scene(Shape(num_prefill=2, num_decode=2, worker=_STEPS), _SPLIT, _SPLIT_STATES),
    "zmq": Scene(
        Shape(num_prefill=2, num_decode=2, mover="zmq", worker=_STEPS),
        (*_SPLIT, "pushing", "pulling"),
        _SPLIT_STATES,
    ),
    "colocated": Scene(
        Shape(num_prefill=0, num_decode=2, mode="colocated", worker=_STEPS),
        ("opened", "reserving a place", "filling", "first token out", "decoding", "releasing"),
        ("reserved", "claimed", "over"),
    ),
    "short of room": Scene(Shape(num_blocks=24, worker=_STEPS), (WAITING, "sealing"), ("waiting",)),
    "giving way": Scene(
        Shape(num_blocks=16, worker={"max_num_seqs": 16}),
        ("suspended", WAITING),
        ("waiting",),
        prompt_tokens=(12, 15),
        num_tokens=(30, 40),
    ),
    "disk": Scene(
        Shape(
            num_blocks=64,
            disk_bytes=1000 * MOCK_LAYOUT.block_bytes,
            worker=_STEPS | {"mock_token_ms": 2.0},
        ),
        (LOADING,),
        ("waiting",),
        prompt_tokens=(90, 100),
        num_prompts=40,
        disk_is_slow=True,
    ),
}
NUM_PAIRS = sum(len(scene.points) for scene in SCENES.values())


class Canceller:
    """Cancels each request at its point. `struck` counts by point, `heard` by the state of the
    handoff when the store heard of it."""

    def __init__(self, cluster: SimCluster) -> None:
        self.struck: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()
        self._cluster = cluster
        self._wanted: dict[str, tuple[str, RequestStream]] = {}  # by request id
        cluster.world.network.listeners.append(self._on_delivery)

    async def follow(self, stream: RequestStream, point: str) -> None:
        """Until the request has ended, one way or the other."""
        self._wanted[stream.request_id] = (point, stream)
        assert stream.task is not None
        await asyncio.wait([stream.task])
        self._wanted.pop(stream.request_id, None)

    def _on_delivery(self, _pipe: Pipe, frames: list[memoryview]) -> None:
        kind = _BY_TAG.get(type_of(frames))
        if kind is None:
            return
        message: Any = decoded(frames, kind)
        if isinstance(message, OpenHandoff):
            asyncio.get_running_loop().call_soon(self._look, message.request_id)
        elif isinstance(message, OutputTokens):
            for token in message.tokens:
                self._at(kind, token, token.handoff_id)
        elif isinstance(message, AbortHandoff):
            handoff = self._find(message.handoff_id, message.open_call_id)
            self.heard[handoff.state.value if handoff else "over"] += 1
        else:
            self._at(kind, message, message.handoff_id)

    def _look(self, request_id: str) -> None:
        """The store has taken the request: it may wait."""
        for ledger in self._cluster.ledgers():
            for handoff in ledger._waiting:
                if handoff.request_id == request_id:
                    self._cancel(request_id, WAITING)
            for handoff in ledger._preparing.values():
                if handoff.request_id == request_id:
                    self._cancel(request_id, LOADING)

    def _at(self, kind: type[Message], what: Any, handoff_id: str) -> None:
        handoff = self._find(handoff_id)
        point, _ = self._wanted.get(handoff.request_id, ("", None)) if handoff else ("", None)
        if point in POINTS and handoff is not None:
            wanted, holds = POINTS[point]
            if wanted is kind and holds(what, handoff):
                self._cancel(handoff.request_id, point)

    def _find(self, handoff_id: str, open_call_id: int = 0) -> Handoff | None:
        for store in self._cluster.stores:
            broker = store.broker
            assert broker is not None
            for waiting_id, (_, call_id) in broker.aborting.waiting_calls.items():
                if open_call_id and call_id == open_call_id:
                    handoff_id = waiting_id
            if handoff_id in broker.ledger.handoffs:
                return broker.ledger.handoffs[handoff_id]
        return None

    def _cancel(self, request_id: str, point: str) -> None:
        wanted, stream = self._wanted.get(request_id, ("", None))
        if stream is not None and wanted == point and not stream.is_over:
            # Every other one comes when the message is taken, and whoever waits for it has not gone
            # on yet.
            if self.struck[point] % 2:
                asyncio.get_running_loop().call_soon(stream.cancel)
            else:
                stream.cancel()
            self.struck[point] += 1
            del self._wanted[request_id]


async def cancel_many(
    cluster: SimCluster, scene: Scene, canceller: Canceller, num_each: int
) -> None:
    """So many more cancels at each of the points, beside requests that end before their point."""
    rng = random.Random(num_each)
    wanted = Counter({point: canceller.struck[point] + num_each for point in scene.points})
    under_way: Counter[str] = Counter()
    budget = iter(range(10 * wanted.total()))  # a point that does not come any more must show

    async def client() -> None:
        while missing := wanted - canceller.struck:
            assert next(budget, None) is not None, missing
            point = min(missing, key=lambda each: under_way[each] - missing[each])
            length = rng.randint(*scene.prompt_tokens)
            number = rng.randrange(scene.num_prompts)
            prompt = [5 + number % 2000, 5 + number // 2000] * (length // 2)
            stream = cluster.submit(prompt, rng.randint(*scene.num_tokens))
            under_way[point] += 1
            await canceller.follow(stream, point)
            under_way[point] -= 1
            assert mock_agrees(prompt, stream.tokens)

    await asyncio.gather(*(client() for _ in range(_NUM_CLIENTS)))


# Names of caches and logs, which have bounds of their own, of what was told last, and of calls: a
# heartbeat may be under way.
_BOUNDED = (
    "pool", "_pool", "history", "_history", "_index", "_cost", "_shown", "_no_room", "_held",
    "_stamps", "_over", "_calls", "_recent", "_kept", "_holders",
)  # fmt: skip


def held(root: object) -> Counter[str]:
    """How many elements the containers of a service's objects have, by their place; but for caches
    and logs, which have bounds of their own."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    line: deque[tuple[str, object]] = deque([("", root)])
    while line:
        path, each = line.popleft()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict | list | set | tuple | deque):
            sizes[path] += len(each)
            values = each.values() if isinstance(each, dict) else each
            line.extend((f"{path}[]", value) for value in list(values))
        elif type(each).__module__.startswith(("services.", "common.")):
            line.extend((f"{path}.{name}", value) for name, value in _fields(each))
    return +sizes


def _fields(each: object) -> Iterator[tuple[str, object]]:
    names = [*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())]
    for name in names:
        if name not in _BOUNDED:
            yield name, getattr(each, name, None)


def processes(cluster: SimCluster) -> list[object]:
    gateways = [gateway.dispatcher for gateway in cluster.gateways]
    return [*cluster.stores, *cluster.workers, *gateways]


def run(name: str) -> None:
    scene, num_each = SCENES[name], -(-NUM_CANCELS // (2 * NUM_PAIRS))

    async def main() -> None:
        world = World(1)
        async with SimCluster(world, scene.shape) as cluster:
            if scene.disk_is_slow:
                world.drive.on.add("slow")
            canceller = Canceller(cluster)
            sizes = []
            for _ in range(2):
                await cancel_many(cluster, scene, canceller, num_each)
                for gateway in cluster.gateways:
                    stream = cluster.submit([9] * 40, 5, gateway=gateway)
                    assert await output_of(stream) == mock_output([9] * 40, 5)
                await cluster.settle()
                assert not any(g.dispatcher.stats()["requests_running"] for g in cluster.gateways)
                sizes.append([held(each) for each in processes(cluster)])
            assert sizes[0] == sizes[1]
            assert all(canceller.struck[point] >= 2 * num_each for point in scene.points)
            assert set(scene.states) <= set(canceller.heard)

    simulate(main(), 100_000)


@pytest.fixture(scope="module")
def has_run(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    with farmed(run, asked_for(request, "has_run", "name")) as has_run:
        yield has_run


@pytest.mark.parametrize("name", SCENES)
def test_a_cancel_at_any_transition_leaves_nothing(
    name: str, has_run: Callable[[str], None]
) -> None:
    has_run(name)
