"""The store in the explored world: the production ledger and broker as values that can be compared.

A store is a tuple. For each message the objects are made from it, the message is handled, and what
they are then is written down again; the same message at the same store is handled once for all.
Blocks are numbered by the place at which they turn up, since any is as good as any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from common.messages import Message
from common.net.server import failed
from kvbaton.errors import KvbatonError
from services.kvstore.blocks import BlockPool, BlockState
from services.kvstore.broker import Broker
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from tests.unit.explorer.messages import message_of, said_by_store
from tests.unit.explorer.values import (
    BLOCK_SIZE,
    BLOCK_STATES,
    GATEWAY,
    HANDOFF_STATES,
    ROLES,
    ROOT,
    TENANT,
    Said,
    StoreState,
    Told,
    canonical,
    handoff_writer,
    key_of,
    member_id,
    member_writer,
    name_of,
    writer_name,
)


class AnyOrder:
    """Evicts any block that it may evict: `picks` tells which of those there are at each turn."""

    def __init__(self, picks: list[int]) -> None:
        self.blocks: set[int] = set()
        self.num_choices: list[int] = []
        self._picks = picks

    def __len__(self) -> int:
        return len(self.blocks)

    def add(
        self, block: int, tenant: bytes, *, key: bytes | None = None, cold: bool = False
    ) -> None:
        self.blocks.add(block)

    def remove(self, block: int) -> None:
        self.blocks.remove(block)

    def victim(self, is_leaf: Callable[[int], bool]) -> int:
        choices = [block for block in sorted(self.blocks) if is_leaf(block)]
        choices = choices or sorted(self.blocks)
        turn = len(self.num_choices)
        self.num_choices.append(len(choices))
        block = choices[self._picks[turn] if turn < len(self._picks) else 0]
        self.blocks.remove(block)
        return block

    def coldest(self, count: int) -> list[int]:
        return sorted(self.blocks)[:count]


class Store:
    """The production objects in one state."""

    def __init__(self, state: StoreState, prompts: tuple[int, ...], picks: list[int]) -> None:
        self.order = AnyOrder(picks)
        self.members = list(state.members)
        self.lost = set(state.lost)
        self.told: list[Told] = []
        self._prompts = prompts
        self._opening = 0
        self._codes = {name_of(10 * p + i).key: 10 * p + i for p in prompts for i in range(4)}
        self._ids = {
            member_id(process, incarnation): (process, incarnation)
            for process in range(len(ROLES))
            for incarnation in range(10)
        }
        pool = BlockPool(len(state.blocks))
        self.ledger = Ledger(pool, BLOCK_SIZE, lambda: f"h{self._opening}", growth_blocks=1)
        self.broker = Broker(self.ledger, self._send, self._role_of, lambda _: False)
        self._thaw_pool(pool, state)
        self._thaw_ledger(state)

    def _thaw_pool(self, pool: BlockPool, state: StoreState) -> None:
        pool._cached = self.order
        pool._free = deque(state.free)
        pool._counts = dict.fromkeys(BlockState, 0)
        for block_id, (kind, writer, name, num_readers) in enumerate(state.blocks):
            block = pool[block_id]
            block.state = BLOCK_STATES[kind]
            block.writer, block.num_readers = writer_name(writer), num_readers
            pool._counts[block.state] += 1
            if name >= 0:
                block.name = name_of(name)
                pool._index[block.name.key] = block_id
                parent = block.name.parent
                pool._num_children[parent] = pool._num_children.get(parent, 0) + 1
            if block.state is BlockState.CACHED:
                self.order.blocks.add(block_id)

    def _thaw_ledger(self, state: StoreState) -> None:
        ledger = self.ledger
        for (
            number, epoch, gateway, prefill, decode, kind, blocks, num_committed, num_cached,
            num_reserved, writer, is_fenced, is_kept, num_computed, num_keys, num_tokens,
        ) in state.handoffs:  # fmt: skip
            prompt = self._prompts[number]
            ledger.handoffs[f"h{number}"] = Handoff(
                handoff_id=f"h{number}",
                epoch=epoch,
                request_id=f"r{number}",
                gateway_id=member_id(GATEWAY, gateway),
                prefill_id=member_id(*prefill),
                decode_id=member_id(*decode),
                tenant=TENANT,
                root_key=ROOT,
                keys=[key_of(prompt, index) for index in range(num_keys)],
                num_tokens=num_tokens,
                state=HANDOFF_STATES[kind],
                blocks=list(blocks),
                num_committed=num_committed,
                num_cached=num_cached,
                num_reserved=num_reserved,
                writer=member_id(*writer) if writer else "",
                is_fenced=is_fenced,
                is_kept=is_kept,
                num_computed=num_computed,
            )
            ledger.num_reserved += num_reserved
        ledger._waiting = deque(ledger.handoffs[f"h{number}"] for number in state.waiting)
        ledger._no_room = ledger._room()
        self.broker.aborting.waiting_calls = {
            f"h{number}": (member_id(process, incarnation), call_id)
            for number, process, incarnation, call_id in state.calls
        }

    def freeze(self) -> tuple[StoreState, tuple[int, ...]]:
        """The state, and what each block is called in it."""
        ledger, pool = self.ledger, self.ledger.pool
        calls = self.broker.aborting.waiting_calls.items()
        return canonical(
            StoreState(
                members=tuple(self.members),
                lost=tuple(sorted(self.lost)),
                handoffs=tuple(
                    self._freeze_handoff(ledger.handoffs[each]) for each in sorted(ledger.handoffs)
                ),
                waiting=tuple(int(handoff.handoff_id[1:]) for handoff in ledger._waiting),
                calls=tuple(
                    sorted((int(each[1:]), *self._ids[who], call) for each, (who, call) in calls)
                ),
                blocks=tuple(self._freeze_block(block) for block in range(pool.num_blocks)),
                free=tuple(pool._free),
            )
        )

    def _freeze_handoff(self, handoff: Handoff) -> tuple[Any, ...]:
        return (
            int(handoff.handoff_id[1:]), handoff.epoch, self._ids[handoff.gateway_id][1],
            self._ids[handoff.prefill_id], self._ids[handoff.decode_id],
            HANDOFF_STATES.index(handoff.state), tuple(handoff.blocks), handoff.num_committed,
            handoff.num_cached, handoff.num_reserved,
            self._ids[handoff.writer] if handoff.writer else (), handoff.is_fenced,
            handoff.is_kept, handoff.num_computed, len(handoff.keys), handoff.num_tokens,
        )  # fmt: skip

    def _freeze_block(self, block_id: int) -> tuple[int, int, int, int]:
        block = self.ledger.pool[block_id]
        writer = 0
        if block.writer.startswith("h"):
            writer = handoff_writer(int(block.writer[1:]))
        elif block.writer:
            writer = member_writer(*self._ids[block.writer])
        name = self._codes[block.name.key] if block.name else -1
        return BLOCK_STATES.index(block.state), writer, name, block.num_readers

    # ---- events, as services/kvstore/service.py takes them ---------------------------------------

    def _send(self, member: str, message: Message) -> None:
        process, incarnation = self._ids[member]
        if self.members[process] == incarnation:
            self.told.append((process, said_by_store(message)))

    def _role_of(self, member: str) -> str | None:
        process, incarnation = self._ids[member]
        return ROLES[process] if self.members[process] == incarnation else None

    def handle(self, process: int, incarnation: int, said: Said) -> None:
        kind, number, what, _ = said
        sender = member_id(process, incarnation)
        if kind == "stopped":
            if self.members[process] == what or (process, what) in self.lost:
                self.lose(process, what, stopped=True)
            return
        self._opening = number
        message = message_of(said, self._prompts[number])
        say = self.broker.from_gateway if process == GATEWAY else self.broker.from_worker
        before = self.freeze()
        try:
            answer = say(sender, message)
        except KvbatonError as error:
            assert self.freeze() == before, "a refusal changed something"
            answer = failed(error, message.call_id) if message.call_id else None
        self.broker.admit()
        if answer is not None:
            answer.call_id = message.call_id
            self._send(sender, answer)

    def lose(self, process: int, incarnation: int, *, stopped: bool) -> None:
        member = member_id(process, incarnation)
        if self.members[process] == incarnation:
            self.members[process] = -1
            self.broker.lose(member, "it is lost")
            self.ledger.lose_writer(member)
            stopped |= not self.ledger.waits_for(member)
            if not stopped:
                self.lost.add((process, incarnation))
        if stopped:
            self.lost.discard((process, incarnation))
            self.ledger.member_stopped(member)
        self.broker.admit()

    def join(self, process: int, incarnation: int) -> None:
        former = self.members[process]
        if former not in (-1, incarnation):
            self.lose(process, former, stopped=False)
        self.members[process] = incarnation

    def die(self, process: int) -> None:
        """Its end is seen by the system, for every incarnation of it."""
        current = self.members[process]
        if current >= 0:
            self.lose(process, current, stopped=True)
        for lost in sorted(self.lost):
            if lost[0] == process:
                self.lose(*lost, stopped=True)

    # ---- what always holds ----------------------------------------------------------------------

    def check(self) -> None:
        """Every block has an owner that may write it, or nobody may; no room is left unused."""
        ledger, pool = self.ledger, self.ledger.pool
        ledger.check()
        ledger._no_room = None
        assert not ledger.admit(), "somebody waits who has room"
        for block in pool._blocks:
            if block.state is BlockState.GRANTED:
                if block.writer in self._ids:
                    assert self._role_of(block.writer), "a block is granted to no member"
                else:
                    state = ledger.handoffs[block.writer].state
                    assert state in (HandoffState.FILLING, HandoffState.SEALED, HandoffState.HELD)
            elif block.state is BlockState.QUARANTINED:
                if block.writer in self._ids:
                    assert self._ids[block.writer] in self.lost, "nobody can end this quarantine"
                else:
                    assert ledger.handoffs[block.writer].state is HandoffState.ABORTING
        owned = [
            block
            for handoff in ledger.handoffs.values()
            for block in handoff.blocks[handoff.num_committed :]
            if pool[block].writer == handoff.handoff_id
        ]
        for handoff in ledger.handoffs.values():
            if handoff.state is HandoffState.ABORTING:
                who = self._ids[handoff.writer]
                assert self._role_of(handoff.writer) or who in self.lost, "nobody will quit"
        by_handoffs = [each for each in range(pool.num_blocks) if pool[each].writer[:1] == "h"]
        assert sorted(owned) == by_handoffs, "a block of a handoff is in no table, or in two"
