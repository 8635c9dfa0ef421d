"""The store of the explored world as a value, and the names of what is in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from services.kvstore.blocks import BlockName, BlockState
from services.kvstore.handoff import HandoffState

BLOCK_SIZE = 2
PROMPT_TOKENS = 3  # a full block, and one that changes hands unfinished
LEASE_CALL = 99
ROLES = ("gateway", "prefill", "prefill", "decode", "decode")
GATEWAY, PREFILLS, DECODES = 0, (1, 2), (3, 4)
ROOT, TENANT = b"root", b"tenant"

# kind, handoff, further numbers, blocks
Said = tuple[str, int, Any, tuple[int, ...]]
Told = tuple[int, Said]  # by the store, to a process
Event = tuple[Any, ...]

HANDOFF_STATES = tuple(HandoffState)
BLOCK_STATES = tuple(BlockState)
FREE, GRANTED, COMMITTED, CACHED, QUARANTINED = range(len(BLOCK_STATES))
_TABLE = 6  # where a handoff has its blocks


class StoreState(NamedTuple):
    """`members` has each process's incarnation, -1 for none; `lost` may still write or listen."""

    members: tuple[int, ...]
    lost: tuple[tuple[int, int], ...]
    handoffs: tuple[tuple[Any, ...], ...]
    waiting: tuple[int, ...]
    calls: tuple[tuple[int, ...], ...]  # handoff, process, incarnation, call
    blocks: tuple[tuple[int, int, int, int], ...]  # state, writer, name, readers
    free: tuple[int, ...]


def canonical(state: StoreState) -> tuple[StoreState, tuple[int, ...]]:
    """The same with blocks numbered by the place where they turn up, and what each is called."""
    order = dict.fromkeys(block for handoff in state.handoffs for block in handoff[_TABLE])
    rest = [block for block in range(len(state.blocks)) if block not in order]
    rest.sort(key=lambda block: (state.blocks[block][1:3], block))
    order |= dict.fromkeys(block for block in rest if state.blocks[block][0] != FREE)
    order |= dict.fromkeys(state.free)
    names = [0] * len(state.blocks)
    for number, block in enumerate(order):
        names[block] = number
    handoffs = tuple(
        (*each[:_TABLE], tuple(names[block] for block in each[_TABLE]), *each[_TABLE + 1 :])
        for each in state.handoffs
    )
    blocks = tuple(state.blocks[block] for block in order)
    free = tuple(names[block] for block in state.free)
    return state._replace(handoffs=handoffs, blocks=blocks, free=free), tuple(names)


def renamed(
    state: StoreState, handoffs: tuple[int, ...], processes: tuple[int, ...]
) -> tuple[StoreState, tuple[int, ...]]:
    """The same with other numbers for handoffs and processes, and what each block is called."""

    def member(who: tuple[int, ...]) -> tuple[int, ...]:
        return (processes[who[0]], who[1]) if who else ()

    def writer(code: int) -> int:
        if code >= 100:
            process, incarnation = divmod(code - 100, 10)
            return member_writer(processes[process], incarnation)
        return handoff_writer(handoffs[code - 10]) if code else 0

    members = [-1] * len(processes)
    for process, incarnation in enumerate(state.members):
        members[processes[process]] = incarnation
    return canonical(
        StoreState(
            members=tuple(members),
            lost=tuple(sorted((processes[process], inc) for process, inc in state.lost)),
            handoffs=tuple(
                sorted(
                    (
                        handoffs[each[0]], *each[1:3], member(each[3]), member(each[4]),
                        *each[5:10], member(each[10]), *each[11:],
                    )
                    for each in state.handoffs
                )
            ),
            waiting=tuple(handoffs[each] for each in state.waiting),
            calls=tuple(
                sorted(
                    (handoffs[each[0]], processes[each[1]], each[2], handoffs[each[0]] + 1)
                    for each in state.calls
                )
            ),
            blocks=tuple((each[0], writer(each[1]), *each[2:]) for each in state.blocks),
            free=state.free,
        )
    )  # fmt: skip


class Outcome(NamedTuple):
    """What an event makes of a store: `numbers[block]` is what a block is called now."""

    store: int
    numbers: tuple[int, ...]
    told: tuple[Told, ...]
    num_evicted: int = 0


def member_id(process: int, incarnation: int) -> str:
    return f"{ROLES[process]}-{process}.{incarnation}"


def key_of(prompt: int, index: int) -> bytes:
    return b"%d:%d" % (prompt, index)


def name_of(code: int) -> BlockName:
    """The name of block `code % 10` of prompt `code // 10`."""
    prompt, index = divmod(code, 10)
    parent = key_of(prompt, index - 1) if index else ROOT
    return BlockName(key_of(prompt, index), parent, TENANT)


# Writers of blocks as numbers: 0 is nobody.
def handoff_writer(handoff: int) -> int:
    return 10 + handoff


def member_writer(process: int, incarnation: int) -> int:
    return 100 + process * 10 + incarnation


def writer_name(code: int) -> str:
    if code >= 100:
        return member_id(*divmod(code - 100, 10))
    return f"h{code - 10}" if code else ""
