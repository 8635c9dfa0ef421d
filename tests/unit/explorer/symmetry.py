"""States of the explored world that are one.

They differ only by the numbers of blocks, of workers of one role, of requests with equal prompts,
or of messages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.unit.explorer.members import Members
from tests.unit.explorer.stores import Stores
from tests.unit.explorer.values import DECODES, PREFILLS, ROLES
from tests.unit.explorer.world import State


class Symmetry:
    """Gives each state the numbers that all those have that are one with it."""

    def __init__(self, prompts: tuple[int, ...], stores: Stores) -> None:
        self.counts: Counter[str] = Counter()
        self._prompts = prompts
        self._stores = stores

    def canonical(self, world: Members) -> State:
        for process in range(len(ROLES)):
            if world.up[process] or world.down[process]:
                for kind in world.skip(process):
                    self.counts[f"ignore {kind}"] += 1
            _count_from_one(world, process)
        handoffs = self._order_of_requests(world)
        if handoffs != tuple(range(len(handoffs))):
            self._rename(world, handoffs, tuple(range(len(ROLES))))
        processes = list(range(len(ROLES)))
        for one, other in (PREFILLS, DECODES):
            if _comes_after(world, one, other):
                processes[one], processes[other] = other, one
        if processes != list(range(len(ROLES))):
            self._rename(world, tuple(range(len(handoffs))), tuple(processes))
        return world.state()

    def _order_of_requests(self, world: Members) -> tuple[int, ...]:
        """New numbers for the handoffs; those of equal prompts change places."""
        prompts = self._prompts
        rows: dict[int, tuple[Any, ...]] = {row[0]: row[1:] for row in world.store.handoffs}
        keys = [
            (-request[0], *(rows[handoff][k] for k in (0, 4, 6, 7, 8, 10)))
            if handoff in rows
            else (-request[0], -1)
            for handoff, request in enumerate(world.requests)
        ]
        numbers = [0] * len(prompts)
        for prompt in set(prompts):
            places = [each for each, other in enumerate(prompts) if other == prompt]
            for place, each in zip(places, sorted(places, key=keys.__getitem__), strict=True):
                numbers[each] = place
        return tuple(numbers)

    def _rename(
        self, world: Members, handoffs: tuple[int, ...], processes: tuple[int, ...]
    ) -> None:
        outcome = self._stores.renamed(world.store_id, handoffs, processes)
        world.rename(handoffs, processes)
        world.store, world.store_id = self._stores.states[outcome.store], outcome.store
        world.rename_blocks(outcome.numbers)


def _comes_after(world: Members, one: int, other: int) -> bool:
    """An order of processes that does not hang on their numbers."""
    mine, its = (
        (
            world.links[each], world.conns[each] or (), world.hellos[each], worker.seqs,
            worker.spare, worker.asking, worker.starved, worker.step or (),
        )
        for each, worker in ((one, world.worker(one)), (other, world.worker(other)))
    )  # fmt: skip
    if mine != its:
        return mine > its
    here, there = ((world.up[each], world.down[each]) for each in (one, other))
    return here != there and repr(here) > repr(there)


def _count_from_one(world: Members, process: int) -> None:
    """Numbers of messages tell no more than which is next: each connection is counted anew."""
    link, conn = world.links[process], world.conns[process]
    connection, expected, number = conn or (-1, 1, 1)
    same = connection == link.connection
    seen_up, seen_down = expected - 1, max(0, link.expected - 1) if same else 0
    if seen_up or seen_down:
        if same:
            world.links[process] = link._replace(
                next_up=link.next_up - seen_up, expected=link.expected - seen_down
            )
        world.conns[process] = (connection, 1, number - seen_down)
    if conn is not None and not same and number != 1:
        world.conns[process] = (connection, 1, 1)  # whatever it says will be ignored
    for box, seen in ((world.up, seen_up), (world.down, seen_down)):
        if box[process] and (seen or link.connection):
            box[process] = tuple(
                (c, max(0, n - seen) if c == connection else n if c == link.connection else 0, said)
                for c, n, said in box[process]
            )
