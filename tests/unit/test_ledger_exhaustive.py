"""Every order of every step in a world of one gateway, one prefill, one decode and three blocks.

Breadth first: each state that differs is visited once, by the shortest way that leads to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator

import pytest

from common.messages import Commit
from services.kvstore.handoff import HandoffState
from tests.unit.ledger_world import BLOCK_SIZE, LedgerWorld

PROMPTS = ([5, 5, 6], [5, 5, 6, 6])  # two blocks each, the first in common
NUM_BLOCKS = 3

WORKER_STEPS = (
    "fill", "commit", "commit_last", "seal", "finish", "claim", "release", "yield", "quit",
    "stale_claim",
)  # fmt: skip

Step = tuple[str, ...]
Path = tuple[Step, ...]


def steps_in(world: LedgerWorld, num_requests: int, num_attempts: int) -> Iterator[Step]:
    """All that could be said next, due or not."""
    workers = sorted(world.alive - {"gateway"})
    if world.num_opened < num_requests and len(workers) == 2:
        yield ("open",)
    for handoff_id, handoff in world.ledger.handoffs.items():
        yield "abort", "gateway", handoff_id
        if num_requests <= world.num_opened < num_attempts and len(workers) == 2:
            yield "go_on", handoff_id
        for worker in workers:
            for step in WORKER_STEPS:
                yield step, worker, handoff_id
        if handoff.epoch == 1 and "decode" in workers:  # once, or there were no end of epochs
            yield "suspend", "decode", handoff_id
    for worker in workers:
        yield "give_back", worker
        yield "lose", worker
    if "decode" in workers:
        yield "lease", "decode"
    for member in sorted(world.alive - {"gateway"} | world.silent):
        yield "stop", member


def take(world: LedgerWorld, step: Step) -> None:
    match step:
        case ("open",):
            world.open("gateway", "prefill", "decode", PROMPTS[world.num_opened])
        case ("go_on", handoff_id):
            world.go_on("gateway", handoff_id, "prefill", "decode", 1)
        case ("yield", worker, handoff_id):
            handoff = world.ledger.handoffs[handoff_id]
            world.yield_(worker, handoff_id, handoff.num_committed * BLOCK_SIZE + 1)
        case ("finish", worker, handoff_id):
            world.seal(worker, handoff_id, finished=True)
        case ("stale_claim", worker, handoff_id):
            world.claim(worker, handoff_id, epoch_shift=-1)
        case ("commit_last", worker, handoff_id):
            handoff = world.ledger.handoffs[handoff_id]
            first, last = handoff.num_committed, handoff.blocks[-1:]
            world.tell(
                worker,
                Commit(handoff_id=handoff_id, epoch=handoff.epoch, first_index=first, blocks=last),
            )
        case ("lease", worker):
            world.lease(worker, 1)
        case ("give_back", worker):
            world.give_back(worker, list(range(NUM_BLOCKS)))
        case (name, *arguments):
            getattr(world, name)(*arguments)


def replayed(path: Path) -> LedgerWorld:
    world = LedgerWorld(NUM_BLOCKS, ["gateway", "prefill", "decode"])
    world.is_watched = False
    for step in path:
        take(world, step)
    world.is_watched = True
    return world


def state_of(world: LedgerWorld) -> Hashable:
    """All that decides what can happen next, with blocks by place, since any is as good as any."""
    ledger, pool = world.ledger, world.ledger.pool
    handoffs = [ledger.handoffs[each] for each in sorted(ledger.handoffs)]
    named = [block for handoff in handoffs for block in handoff.blocks] + pool.coldest(NUM_BLOCKS)
    places = {block: place for place, block in enumerate(dict.fromkeys(named))}
    unnamed = [pool[block] for block in range(NUM_BLOCKS) if block not in places]
    return (
        tuple(
            (
                handoff.handoff_id, handoff.epoch, handoff.state, handoff.writer,
                handoff.num_committed, handoff.num_reserved, len(handoff.keys), handoff.is_fenced,
                handoff.is_kept, handoff.num_computed,
                tuple(places[block] for block in handoff.blocks),
            )
            for handoff in handoffs
        ),
        tuple((pool[block].state, pool[block].writer, pool[block].name) for block in places),
        frozenset(Counter((block.state, block.writer) for block in unnamed).items()),
        tuple(handoff.handoff_id for handoff in ledger._waiting),
        frozenset(world.alive),
        frozenset(world.silent),
        world.num_opened,
    )  # fmt: skip


def explore(
    num_requests: int, num_attempts: int, most_steps: int
) -> tuple[int, set[HandoffState], bool]:
    """Visit every state within so many steps. Returns how many there are, where handoffs stood in
    them, and whether no further step leads to another."""
    seen = {state_of(replayed(()))}
    stood: set[HandoffState] = set()
    paths: list[Path] = [()]
    for _ in range(most_steps):
        reached: list[Path] = []
        for path in paths:
            world = replayed(path)
            stood.update(handoff.state for handoff in world.ledger.handoffs.values())
            before = state_of(world)
            for step in list(steps_in(world, num_requests, num_attempts)):
                take(world, step)
                world.check()
                after = state_of(world)
                if after == before:
                    continue
                if after not in seen:
                    seen.add(after)
                    reached.append((*path, step))
                world = replayed(path)
            world.end()
        paths = reached
    return len(seen), stood, not paths


@pytest.mark.long
@pytest.mark.timeout(300)
def test_one_request_keeps_the_books_in_every_state_it_can_reach() -> None:
    num_states, stood, is_all = explore(num_requests=1, num_attempts=1, most_steps=20)
    assert is_all
    assert stood == set(HandoffState)
    assert num_states > 500


def test_a_request_that_goes_on_elsewhere_keeps_the_books_whatever_comes_first() -> None:
    num_states, stood, _ = explore(num_requests=1, num_attempts=2, most_steps=6)
    assert stood == set(HandoffState)
    assert num_states > 800


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_requests", [1, 2])
def test_more_steps_of_two_attempts_keep_the_books(num_requests: int) -> None:
    num_states, stood, _ = explore(num_requests, num_attempts=2, most_steps=9)
    assert stood == set(HandoffState)
    assert num_states > 5000


def test_two_requests_keep_the_books_whatever_comes_first() -> None:
    num_states, stood, _ = explore(num_requests=2, num_attempts=2, most_steps=6)
    assert stood == set(HandoffState)
    assert num_states > 800
