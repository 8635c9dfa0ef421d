"""Explores a small world breadth first: every state it can reach within given bounds, once.

From each of them everything can come to an end: the next state on the way there is remembered, and
these ways are followed when all is explored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from tests.unit.explorer.moves import Bounds, Label, Moves
from tests.unit.explorer.world import State


class ViolationError(AssertionError):
    """Something that must never be; the message has the shortest way there."""


@dataclass
class Explored:
    """`is_all`: nothing is left within the bounds, and the last step brought nothing new."""

    bounds: Bounds
    num_states: int = 0
    num_stores: int = 0
    num_moves: int = 0
    num_steps: int = 0
    is_all: bool = False
    counts: Counter[str] = field(default_factory=Counter)


@contextmanager
def quiet() -> Iterator[None]:
    """The store logs each transition."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def explore(bounds: Bounds) -> Explored:
    """Visit every state. Raises ViolationError."""
    with quiet():
        return _Search(bounds).run()


class _Search:
    def __init__(self, bounds: Bounds) -> None:
        self.moves = Moves(bounds)
        self.found = Explored(bounds)
        self.came_from: dict[int, tuple[int, Label]] = {}
        self.to_end: dict[int, int] = {}  # the next state on the way to the end; 0 at the end

    def run(self) -> Explored:
        found, first = self.found, self.moves.first()
        self.came_from[hash(first)] = (0, ())
        states = [first]
        while states and found.num_steps < found.bounds.most_steps:
            reached: list[State] = []
            for state in states:
                self._visit(state, reached)
            states = reached
            found.num_steps += 1
        found.is_all = not states
        for state in states:
            self._end(state, {})
        self._check_ends()
        found.num_states = len(self.came_from)
        found.counts += self.moves.counts
        found.num_stores = len(self.moves.stores.states)
        return found

    def _visit(self, state: State, reached: list[State]) -> None:
        here = hash(state)
        label: Label = ("what holds then",)
        try:
            self.moves.world(state).check()
            delivered = not any(state.up) and not any(state.down)
            for label, world in self.moves.moves(state):
                self.found.num_moves += 1
                self.found.counts[label[0]] += 1
                after = self.moves.symmetry.canonical(world)
                there = hash(after)
                if there not in self.came_from:
                    self.came_from[there] = (here, label)
                    reached.append(after)
                if not delivered:  # the first move is a delivery
                    self.to_end[here], delivered = there, True
            if here not in self.to_end:
                label = ("the end",)
                self._end(self._step_to_end(state), self.came_from)
        except Exception as error:
            raise ViolationError(self._trace(here, label, error)) from error

    def _step_to_end(self, state: State) -> State | None:
        after = self.moves.toward_the_end(state)
        self.to_end[hash(state)] = hash(after) if after is not None else 0
        return after

    def _end(self, state: State | None, known: Container[int]) -> None:
        """Follow a state to the end, or to one of which that is known or will be."""
        while state is not None and hash(state) not in self.to_end and hash(state) not in known:
            state = self._step_to_end(state)

    def _check_ends(self) -> None:
        """Every way to the end gets there."""
        ends: set[int] = {0}
        for start in self.to_end:
            way: dict[int, None] = {}
            here = start
            while here not in ends:
                assert here not in way, "a way to the end runs in a circle"
                way[here] = None
                here = self.to_end[here]
            ends.update(way)

    def _trace(self, here: int, label: Label, error: Exception) -> str:
        way = [label]
        while here:
            here, label = self.came_from[here]
            way.append(label)
        lines = [" ".join(map(str, each)) for each in reversed(way) if each]
        return "\n".join([f"{type(error).__name__}: {error}, after", *lines])
