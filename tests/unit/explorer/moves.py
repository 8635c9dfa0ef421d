"""What can happen next in the explored world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.unit.explorer.members import Members
from tests.unit.explorer.stores import Stores
from tests.unit.explorer.symmetry import Symmetry
from tests.unit.explorer.values import (
    CACHED,
    DECODES,
    FREE,
    GATEWAY,
    PREFILLS,
    ROLES,
    Event,
    StoreState,
)
from tests.unit.explorer.world import LAST, LISTENING, NEW, OPENING, Link, State, Worker

Label = tuple[Any, ...]


@dataclass(frozen=True)
class Bounds:
    """`prompts`: one for each handoff, as numbers. `most_in_flight`: messages after which nobody
    begins anything new; what they bring about is still said."""

    prompts: tuple[int, ...] = (0, 0, 1)
    num_prefills: int = 2
    num_decodes: int = 2
    num_blocks: int = 4
    most_in_flight: int = 3
    most_faults: int = 2
    most_steps: int = 1000


class Moves:
    """The moves of one exploration."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.stores = Stores(bounds.prompts)
        self.symmetry = Symmetry(bounds.prompts, self.stores)
        self.counts = self.symmetry.counts

    def first(self) -> State:
        bounds = self.bounds
        there = [True] * len(ROLES)
        there[PREFILLS[1]], there[DECODES[1]] = bounds.num_prefills > 1, bounds.num_decodes > 1
        store = StoreState(
            members=tuple(0 if each else -1 for each in there),
            lost=(),
            handoffs=(),
            waiting=(),
            calls=(),
            blocks=((FREE, 0, -1, 0),) * bounds.num_blocks,
            free=tuple(range(bounds.num_blocks)),
        )
        return State(
            store=self.stores.number(store),
            links=tuple(Link(alive=each) for each in there),
            conns=tuple((0, 1, 1) if each else None for each in there),
            hellos=(0,) * len(ROLES),
            workers=(None, *(Worker() for _ in ROLES[1:])),
            requests=((NEW, (), ()),) * len(bounds.prompts),
            up=((),) * len(ROLES),
            down=((),) * len(ROLES),
            contents=(0,) * bounds.num_blocks,
            faults=bounds.most_faults,
        )

    def world(self, state: State) -> Members:
        return Members(state, self.bounds.prompts, self.stores.states[state.store])

    # ---- moves -----------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[tuple[Label, Members]]:
        """All that can happen next, and what it makes.

        A worker that can but hear does so at once, unless what it would hear is disturbed: what it
        says then can still be long on its way, and nothing else has to do with it.
        """
        has_room = sum(map(len, state.up)) + sum(map(len, state.down)) < self.bounds.most_in_flight
        for process in (*PREFILLS, *DECODES):
            if self._can_but_hear(state, process):
                if state.down[process]:
                    yield from self.to_member(state, process)
                    if state.faults:
                        yield from self._disturb(state, process, "down", has_room=has_room)
                    return
                if has_room and self.is_cut_off(state, process):
                    yield from self._beat(state, process)
                    return
        for process in range(len(ROLES)):
            if state.down[process]:
                yield from self.to_member(state, process)
            if state.up[process]:
                yield from self.to_store(state, process)
        yield from self._steps(state, has_room=has_room)
        if has_room:
            yield from self._beginnings(state)
        if state.faults:
            yield from self._faults(state, has_room=has_room)

    def to_member(self, state: State, process: int) -> Iterator[tuple[Label, Members]]:
        world = self.world(state)
        kind = state.down[process][0][2][0]
        said = world.receive(process)
        if said is not None:
            world.hear(process, said)
        resumes = kind == "opened" and process in DECODES
        verb = "ignore" if said is None else "resume after" if resumes else "hear"
        yield (f"{verb} {kind}", process), world

    def to_store(self, state: State, process: int) -> Iterator[tuple[Label, Members]]:
        world = self.world(state)
        event = world.arrive(process)
        said = state.up[process][0][2]
        if event is None:
            kind = "beat" if said[0] == "beat" else f"ignore {said[0]}"
            yield (kind, process, *said[1:]), world
            return
        kind = said[0] if event[0] != "lose" else "gap"
        yield from self.happen(world, event, (kind, process, *said[1:]))

    def happen(self, world: Members, event: Event, label: Label) -> Iterator[tuple[Label, Members]]:
        state = world.state()
        for outcome in self.stores.outcomes(state.store, event):
            self.counts["evict"] += outcome.num_evicted
            after = self.world(state)
            after.take(outcome, self.stores.states[outcome.store])
            if event[0] == "join":
                conn = after.conns[event[1]]
                assert conn is not None
                after.tell(event[1], ("welcome", 0, 0, ()), conn)
            yield label, after

    def _steps(self, state: State, *, has_room: bool) -> Iterator[tuple[Label, Members]]:
        for process in (*PREFILLS, *DECODES):
            worker = state.workers[process]
            if worker is None or not state.links[process].alive:
                continue
            if worker.step is None:
                world = self.world(state)
                if worker.seqs and world.begin_step(process):
                    yield ("begin step", process), world
            elif has_room:
                for finish in (False, True):
                    world = self.world(state)
                    world.end_step(process, finish=finish)
                    yield ("end step", process, finish), world

    def _beginnings(self, state: State) -> Iterator[tuple[Label, Members]]:
        gateway, here = state.links[GATEWAY], self.world(state)
        if gateway.alive:
            for handoff, (status, _, _) in enumerate(state.requests):
                if status in (OPENING, LISTENING):
                    world = self.world(state)
                    world.cancel(handoff)
                    yield ("cancel", handoff), world
        if gateway.alive and gateway.welcomed:
            yield from self._opens(state)
        for process in DECODES:
            link, worker = state.links[process], here.worker(process)
            if not link.alive or not link.welcomed or not here.lacks_block(process):
                continue
            if not worker.asking and not worker.starved:
                world = self.world(state)
                world.lease(process)
                yield ("ask for a lease", process), world
            for seq in here.plannable(process):
                if worker.starved and seq.epoch == 1 and seq.computed == LAST - 1:
                    world = self.world(state)
                    world.suspend(process, seq)
                    yield ("give way", process, seq.handoff), world
        for process in range(len(ROLES)):
            if self.is_cut_off(state, process):
                yield from self._beat(state, process)

    def _beat(self, state: State, process: int) -> Iterator[tuple[Label, Members]]:
        world = self.world(state)
        world.say(process, ("beat", 0, 0, ()))
        yield ("send heartbeat", process), world

    @staticmethod
    def _can_but_hear(state: State, process: int) -> bool:
        worker = state.workers[process]
        assert worker is not None
        idle = all(seq.over or seq.phase not in ("ready", "active") for seq in worker.seqs)
        return idle and worker.step is None and state.links[process].alive

    def _opens(self, state: State) -> Iterator[tuple[Label, Members]]:
        prompts = self.bounds.prompts
        new = [each for each, request in enumerate(state.requests) if request[0] == NEW]
        for handoff in {prompts[each]: each for each in reversed(new)}.values():
            for prefill in self._fit(state, PREFILLS):
                for decode in self._fit(state, DECODES):
                    world = self.world(state)
                    world.open(handoff, prefill, decode)
                    yield ("ask to open", handoff, prefill, decode), world

    @staticmethod
    def _fit(state: State, processes: tuple[int, ...]) -> list[int]:
        """Workers that the gateway may believe to be there."""
        links = state.links
        return [p for p in processes if links[p].alive and links[p].welcomed and not links[p].owed]

    @staticmethod
    def is_cut_off(state: State, process: int) -> bool:
        """Whether only a heartbeat can bring it out that something was lost."""
        link, conn = state.links[process], state.conns[process]
        if not link.alive or state.up[process] or state.down[process]:
            return False
        return conn != (link.connection, link.next_up, link.expected)

    # ---- faults ----------------------------------------------------------------------------------

    def _faults(self, state: State, *, has_room: bool) -> Iterator[tuple[Label, Members]]:
        for process in range(len(ROLES)):
            if not state.links[process].alive:
                continue
            world = self.world(state)
            world.faults -= 1
            if self.stores.states[state.store].members[process] >= 0:
                world.conns[process] = None
                member = self.stores.states[state.store].members[process]
                yield from self.happen(world, ("lose", process, member), ("expire", process))
            world.links[process] = Link(alive=False)
            world.conns[process] = None
            world.hellos[process] = 0
            world.up[process] = world.down[process] = ()
            if process != GATEWAY:
                world.workers[process] = Worker()
            yield from self.happen(world, ("die", process), ("crash", process))
            for box in ("up", "down"):
                yield from self._disturb(state, process, box, has_room=has_room)

    def _disturb(
        self, state: State, process: int, box: str, *, has_room: bool
    ) -> Iterator[tuple[Label, Members]]:
        packets = getattr(state, box)[process]
        for place, packet in enumerate(packets):
            rest = packets[:place] + packets[place + 1 :]
            made = {"lose message": rest}
            if has_room:
                made["duplicate"] = (*packets, packet)
            if place + 1 < len(packets):
                made["reorder"] = (*rest[: place + 1], packet, *rest[place + 1 :])
            for kind, after in made.items():
                world = self.world(state)
                world.faults -= 1
                getattr(world, box)[process] = after
                yield (kind, process, box, packet[2]), world

    # ---- the end ---------------------------------------------------------------------------------

    def is_all_free(self, state: State) -> bool:
        store = self.stores.states[state.store]
        free = all(block[0] in (FREE, CACHED) for block in store.blocks)
        return free and not store.handoffs and not store.lost

    def toward_the_end(self, state: State) -> State | None:
        """What comes next when nothing new begins and nothing is disturbed; None at the end."""
        for process in range(len(ROLES)):
            if state.down[process]:
                return self.symmetry.canonical(next(self.to_member(state, process))[1])
        for process in range(len(ROLES)):
            if state.up[process]:
                return self.symmetry.canonical(next(self.to_store(state, process))[1])
        world = self.world(state)
        for process in range(len(ROLES)):
            worker = state.workers[process]
            if self.is_cut_off(state, process):
                world.say(process, ("beat", 0, 0, ()))
                return self.symmetry.canonical(world)
            if worker is not None and worker.step is not None:
                world.end_step(process, finish=True)
                return self.symmetry.canonical(world)
        if state.links[GATEWAY].alive:
            for handoff, (status, _, _) in enumerate(state.requests):
                if status in (OPENING, LISTENING):
                    world.cancel(handoff)
                    return self.symmetry.canonical(world)
        assert self.is_all_free(state), "something is held for ever"
        return None
