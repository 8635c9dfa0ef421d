"""The states of the store by number, and what events make of each: tried once for all."""

from __future__ import annotations

from collections.abc import Iterator

from tests.unit.explorer.store import Store
from tests.unit.explorer.values import Event, Outcome, StoreState, renamed


class Stores:
    """The states of the store by number, and what events make of them: each is tried once."""

    def __init__(self, prompts: tuple[int, ...]) -> None:
        self.states: list[StoreState] = []
        self._prompts = prompts
        self._numbers: dict[StoreState, int] = {}
        self._outcomes: dict[tuple[int, Event], list[Outcome]] = {}
        self._renamed: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Outcome] = {}

    def number(self, state: StoreState) -> int:
        number = self._numbers.get(state)
        if number is None:
            Store(state, self._prompts, []).check()
            number = self._numbers[state] = len(self.states)
            self.states.append(state)
        return number

    def outcomes(self, number: int, event: Event) -> list[Outcome]:
        """One for each choice of blocks to evict."""
        found = self._outcomes.get((number, event))
        if found is None:
            found = self._outcomes[number, event] = list(self._try(self.states[number], event))
        return found

    def _try(self, state: StoreState, event: Event) -> Iterator[Outcome]:
        untried: list[list[int]] = [[]]
        while untried:
            picks = untried.pop()
            store = Store(state, self._prompts, picks)
            match event:
                case ("say", process, incarnation, said):
                    store.handle(process, incarnation, said)
                case ("join", process, incarnation):
                    store.join(process, incarnation)
                case ("lose", process, incarnation):
                    store.lose(process, incarnation, stopped=False)
                case ("die", process):
                    store.die(process)
            for turn in range(len(picks), len(store.order.num_choices)):
                done = picks + [0] * (turn - len(picks))
                untried += [[*done, pick] for pick in range(1, store.order.num_choices[turn])]
            after, names = store.freeze()
            told = tuple(
                (process, (*said[:3], tuple(names[block] for block in said[3])))
                for process, said in store.told
            )
            yield Outcome(self.number(after), names, told, len(store.order.num_choices))

    def renamed(
        self, number: int, handoffs: tuple[int, ...], processes: tuple[int, ...]
    ) -> Outcome:
        key = number, handoffs, processes
        found = self._renamed.get(key)
        if found is None:
            state, names = renamed(self.states[number], handoffs, processes)
            found = self._renamed[key] = Outcome(self.number(state), names, ())
        return found
