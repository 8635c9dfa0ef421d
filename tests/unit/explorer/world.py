"""The explored world: a store and its members as automata, their connections, and what is in the
blocks.

Members do what common/worker and the services do on a message. What a worker takes its time for are
steps: they read and write blocks from their begin to their end. Gateways and workers hear of one
another at once. That is the worst case: of tokens that come later the gateway takes no more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.unit.explorer.values import (
    CACHED,
    COMMITTED,
    FREE,
    GATEWAY,
    GRANTED,
    PREFILLS,
    PROMPT_TOKENS,
    ROLES,
    Outcome,
    Said,
    StoreState,
    handoff_writer,
    member_writer,
)

NEW, OPENING, LISTENING, DONE = range(4)  # a request at its gateway
LAST = PROMPT_TOKENS + 2  # most positions of a sequence
MESS = -1  # a block that is being written, or was written from blocks that were not right


class Link(NamedTuple):
    """A member's end of its connection. `owed`: incarnations of which it must say `stopped`."""

    alive: bool = True
    incarnation: int = 0
    connection: int = 0
    next_up: int = 1
    expected: int = 1
    welcomed: bool = True
    owed: tuple[int, ...] = ()


class Seq(NamedTuple):
    """A sequence on a worker. `computed`: positions that have KV in its blocks."""

    handoff: int
    epoch: int
    incarnation: int
    phase: str
    blocks: tuple[int, ...] = ()
    committed: int = 0
    computed: int = 0
    over: bool = False


class Worker(NamedTuple):
    """`step`: the handoffs in the running step, each with whether what it computes is void."""

    seqs: tuple[Seq, ...] = ()
    spare: tuple[int, ...] = ()
    asking: bool = False
    starved: bool = False
    step: tuple[tuple[int, bool], ...] | None = None


# Messages that are of no handoff.
ANYWHERE = (
    "hello",
    "welcome",
    "hello_required",
    "beat",
    "ok",
    "lease",
    "leased",
    "give_back",
    "stopped",
)
CALLS = ("fill", "claim", "refill")
Packet = tuple[int, int, Said]  # connection, place in it, message


class State(NamedTuple):
    """Everything there is. `conns`: the store's ends, each its connection, the number expected and
    the next to send; `hellos`: the connection of each process's last hello."""

    store: int
    links: tuple[Link, ...]
    conns: tuple[tuple[int, int, int] | None, ...]
    hellos: tuple[int, ...]
    workers: tuple[Worker | None, ...]
    requests: tuple[tuple[Any, ...], ...]  # status, prefill, decode
    up: tuple[tuple[Packet, ...], ...]
    down: tuple[tuple[Packet, ...], ...]
    contents: tuple[int, ...]
    faults: int


def full(prompt: int, index: int) -> int:
    return 10 * prompt + index


def partial(prompt: int, index: int) -> int:
    return 1000 + 10 * prompt + index


class World:
    """A state that changes. Wrong is what raises AssertionError."""

    def __init__(self, state: State, prompts: tuple[int, ...], store: StoreState) -> None:
        self.store_id = state.store
        self.store = store
        self.prompts = prompts
        self.links = list(state.links)
        self.conns = list(state.conns)
        self.hellos = list(state.hellos)
        self.workers = list(state.workers)
        self.requests = list(state.requests)
        self.up = list(state.up)
        self.down = list(state.down)
        self.contents = list(state.contents)
        self.faults = state.faults

    def state(self) -> State:
        return State(
            self.store_id, tuple(self.links), tuple(self.conns), tuple(self.hellos),
            tuple(self.workers), tuple(self.requests), tuple(self.up), tuple(self.down),
            tuple(self.contents), self.faults,
        )  # fmt: skip

    def listens(self, handoff: int) -> bool:
        """Whether the gateway still takes tokens of it."""
        return self.links[GATEWAY].alive and self.requests[handoff][0] == LISTENING

    def worker(self, process: int) -> Worker:
        worker = self.workers[process]
        assert worker is not None
        return worker

    # ---- the store -------------------------------------------------------------------------------

    def take(self, outcome: Outcome, store: StoreState) -> None:
        """The store has handled something."""
        before, self.store, self.store_id = self.store, store, outcome.store
        names = outcome.numbers
        if names != tuple(range(len(names))):
            self.rename_blocks(names)
        for old, new in enumerate(names):
            kind, was = store.blocks[new][0], before.blocks[old][0]
            if kind == FREE or (kind == GRANTED and was in (FREE, CACHED)):
                self.contents[new] = 0
        for process, said in outcome.told:
            conn = self.conns[process]
            assert conn is not None
            self.tell(process, said, conn)
        self.void_steps()

    def tell(self, process: int, said: Said, conn: tuple[int, int, int]) -> None:
        connection, expected, number = conn
        self.down[process] += ((connection, number, said),)
        self.conns[process] = (connection, expected, number + 1)

    def rename_blocks(self, names: tuple[int, ...]) -> None:
        """Block `b` is called `names[b]` from now on."""

        def said_of(said: Said) -> Said:
            return said if not said[3] else (*said[:3], tuple(names[each] for each in said[3]))

        for process in range(len(ROLES)):
            for box in (self.up, self.down):
                if box[process]:
                    box[process] = tuple((*each[:2], said_of(each[2])) for each in box[process])
            worker = self.workers[process]
            if worker is not None and (worker.seqs or worker.spare):
                seqs = tuple(
                    seq._replace(blocks=tuple(names[each] for each in seq.blocks))
                    for seq in worker.seqs
                )
                spare = tuple(names[each] for each in worker.spare)
                self.workers[process] = worker._replace(seqs=seqs, spare=spare)
        contents = list(self.contents)
        for old, new in enumerate(names):
            self.contents[new] = contents[old]

    def rename(self, handoffs: tuple[int, ...], processes: tuple[int, ...]) -> None:
        """Other numbers for handoffs and processes, but for those in the store."""

        def said_of(said: Said) -> Said:
            kind, number, what, blocks = said
            if kind == "open":
                what = tuple((processes[each], incarnation) for each, incarnation in what)
            return kind, handoffs[number] if kind not in ANYWHERE else number, what, blocks

        def moved(values: list[Any]) -> list[Any]:
            placed = list(values)
            for old, new in enumerate(processes):
                placed[new] = values[old]
            return placed

        for box in (self.up, self.down):
            box[:] = moved(
                [
                    tuple((*p[:2], said_of(p[2])) for p in packets) if packets else ()
                    for packets in box
                ]
            )
        for process, worker in enumerate(self.workers):
            if worker is not None and worker.seqs:
                seqs = tuple(s._replace(handoff=handoffs[s.handoff]) for s in worker.seqs)
                step = worker.step and tuple((handoffs[each], void) for each, void in worker.step)
                self.workers[process] = worker._replace(seqs=seqs, step=step)
        for values in (self.links, self.conns, self.hellos, self.workers):
            values[:] = moved(values)
        requests = list(self.requests)
        for old, new in enumerate(handoffs):
            status, *who = requests[old]
            who = [(processes[each[0]], each[1]) if each else () for each in who]
            self.requests[new] = (status, *who)

    # ---- workers -------------------------------------------------------------------------------

    def seq(self, process: int, handoff: int) -> Seq:
        return next(each for each in self.worker(process).seqs if each.handoff == handoff)

    def find(self, process: int, handoff: int) -> Seq | None:
        worker = self.worker(process)
        return next((each for each in worker.seqs if each.handoff == handoff), None)

    def replace(self, process: int, seq: Seq) -> None:
        worker = self.worker(process)
        seqs = tuple(seq if each.handoff == seq.handoff else each for each in worker.seqs)
        self.workers[process] = worker._replace(seqs=seqs)

    def may_write(self, process: int, seq_or_spare: Seq | None, block: int) -> bool:
        """Whether the store knows the block as this worker's to write."""
        kind, writer, _, _ = self.store.blocks[block]
        if kind in (FREE, COMMITTED, CACHED):
            return False
        if process in PREFILLS:
            return seq_or_spare is not None and writer == handoff_writer(seq_or_spare.handoff)
        link = self.links[process]
        mine = (
            (*link.owed, link.incarnation) if seq_or_spare is None else (seq_or_spare.incarnation,)
        )
        return writer in [member_writer(process, each) for each in mine]

    # ---- what always holds -----------------------------------------------------------------------

    def check(self) -> None:
        """Who believes to hold a block may write it, alone; and what has a name is what it says."""
        for block, (kind, _, name, _) in enumerate(self.store.blocks):
            if kind in (COMMITTED, CACHED) and name >= 0:
                assert self.contents[block] == name, "a block is not what its key says"
        held: list[int] = []
        for process, worker in enumerate(self.workers):
            if worker is None:
                continue
            for seq in worker.seqs:
                mine = seq.blocks[seq.committed :]
                assert all(self.may_write(process, seq, block) for block in mine), (
                    "not its to write"
                )
                held += mine
            assert all(self.may_write(process, None, block) for block in worker.spare), "not spare"
            held += worker.spare
        assert len(held) == len(set(held)), "two write one block"

    def say(self, process: int, said: Said) -> None:
        raise NotImplementedError

    def void_steps(self) -> None:
        raise NotImplementedError
