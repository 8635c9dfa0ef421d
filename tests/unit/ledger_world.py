"""One store's broker and ledger among members who remember what they were given.

Each message goes the way services/kvstore/service.py takes it. Beside the ledger stands what its
members believe: which blocks each of them may write. `check` compares the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import defaultdict
from itertools import zip_longest

from common.kv.hashing import block_key, prompt_keys
from common.messages import (
    AbortHandoff,
    Claim,
    Commit,
    Discard,
    Failed,
    Fill,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Message,
    OpenHandoff,
    Quit,
    Release,
    Seal,
    Suspend,
    Yield,
)
from kvbaton.errors import KvbatonError
from services.kvstore.blocks import BlockPool, BlockState
from services.kvstore.broker import Broker
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger

BLOCK_SIZE = 2
ROOT_KEY, TENANT = b"root", b"tenant"


def frozen(ledger: Ledger) -> bytes:
    """Everything a ledger consists of, as a value that can be compared."""
    return pickle.dumps({name: each for name, each in vars(ledger).items() if name != "_new_id"})


class LedgerWorld:
    """Beside the ledger, what its members know.

    `held` maps who was given blocks to them: (member, handoff id) for prefill, which holds them
    for one handoff, and (member, "") for the lease of decode."""

    def __init__(self, num_blocks: int, members: list[str], *, growth_blocks: int = 1) -> None:
        numbers = itertools.count(1)
        self.ledger = Ledger(
            BlockPool(num_blocks),
            BLOCK_SIZE,
            lambda: f"handoff-{next(numbers)}",
            growth_blocks=growth_blocks,
        )
        self.broker = Broker(self.ledger, self._receive, self._role_of, lambda _member: False)
        self.alive = set(members)
        self.silent: set[str] = set()  # lost, but may still be writing
        self.held: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.content: dict[int, bytes] = {}  # the key of what was last said to be in a block
        self.reading: dict[tuple[str, int], list[tuple[int, int]]] = {}  # what handoffs had pinned
        self.fenced: set[str] = set()  # handoffs of which their gateway takes no more
        self.suspended: set[str] = set()
        self.prompts: dict[str, list[int]] = {}  # by handoff, as far as they are full blocks
        self._asked_for: dict[int, list[int]] = {}  # the same by call
        self.unanswered: set[tuple[str, int]] = set()
        self._num_calls = 0
        self.num_opened = 0
        self.is_watched = True  # whether refusals are proved to change nothing, which takes time

    # ---- messages -------------------------------------------------------------------------------

    def tell(self, sender: str, message: Message) -> Message | None:
        """Deliver a message. Returns the answer, or the message itself if it needs none; None if
        it was refused, which must change nothing."""
        before = frozen(self.ledger) if self.is_watched else None
        was = self.ledger.handoffs.get(getattr(message, "handoff_id", ""))
        if was is not None:
            was = dataclasses.replace(was, keys=list(was.keys))
        index = dict(self.ledger.pool._index)
        if isinstance(message, OpenHandoff | Suspend):
            self.unanswered.add((sender, message.call_id))
        is_gateways = isinstance(message, OpenHandoff | AbortHandoff)
        take = self.broker.from_gateway if is_gateways else self.broker.from_worker
        try:
            answer = take(sender, message)
        except KvbatonError:
            assert before is None or frozen(self.ledger) == before
            self.unanswered.discard((sender, message.call_id))
            return None
        if isinstance(message, OpenHandoff):
            self.prompts[next(reversed(self.ledger.handoffs))] = self._asked_for[message.call_id]
            self._went_on(sender, message)
        if isinstance(message, Suspend):
            self.suspended.add(message.handoff_id)
        if was is not None:
            if was.state is HandoffState.ABORTING:
                assert self.ledger.pool._index.items() <= index.items()
            if isinstance(message, AbortHandoff) and sender == was.gateway_id:
                self.fenced.add(was.handoff_id)
            if not self._may_say(sender, message, was):
                assert before is None or frozen(self.ledger) == before
            self._believe(sender, message, answer, was)
        if isinstance(answer, Leased):
            self.held[sender, ""].update(answer.blocks)
        if isinstance(message, GiveBack):
            self.held[sender, ""].difference_update(message.blocks)
        self.broker.admit()
        return answer or message

    @staticmethod
    def _may_say(sender: str, message: Message, handoff: Handoff) -> bool:
        """Whether it is one of the handoff's own members, and of its epoch."""
        if getattr(message, "epoch", handoff.epoch) != handoff.epoch:
            return False
        return sender in (handoff.gateway_id, handoff.prefill_id, handoff.decode_id)

    def _believe(self, sender: str, message: Message, answer: Message | None, was: Handoff) -> None:
        """What the sender knows after a step of a handoff that was like this before."""
        handoff_id, now = was.handoff_id, self.ledger.handoffs.get(was.handoff_id)
        mine = (sender, "" if sender == was.decode_id else handoff_id)
        if isinstance(answer, Granted) and now is not None and now.state is not was.state:
            self.held[mine].update(answer.blocks[answer.num_committed :])
        if isinstance(message, Commit):
            said = message.keys or was.keys[message.first_index :]
            late = was.state is HandoffState.ABORTING  # then nobody looks at the keys
            for block, key in zip_longest(message.blocks, said, fillvalue=b""):
                if isinstance(block, int) and block in self.held[mine]:
                    self.held[mine].remove(block)
                    self.content[block] = b"" if late else key
        if isinstance(message, Yield):
            self.held[mine].difference_update(message.blocks)
        if isinstance(message, Seal) or (isinstance(message, Quit) and message.epoch == was.epoch):
            self.held.pop((sender, handoff_id), None)

    def _role_of(self, member: str) -> str | None:
        return member.split("-", 1)[0] if member in self.alive else None

    def _receive(self, member: str, message: Message) -> None:
        if member in self.alive and isinstance(message, HandoffOpened | Failed):
            self.unanswered.remove((member, message.call_id))

    def _call_id(self) -> int:
        self._num_calls += 1
        return self._num_calls

    # ---- a gateway's ----------------------------------------------------------------------------

    def open(
        self, gateway: str, prefill: str, decode: str, tokens: list[int], after: str = ""
    ) -> Message | None:
        self.num_opened += 1
        call_id = self._call_id()
        self._asked_for[call_id] = tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE]
        return self.tell(
            gateway,
            OpenHandoff(
                call_id=call_id,
                request_id="request",
                prefill_id=prefill,
                decode_id=decode,
                tenant=TENANT,
                root_key=ROOT_KEY,
                keys=prompt_keys(ROOT_KEY, tokens, BLOCK_SIZE),
                num_tokens=len(tokens),
                after=after,
            ),
        )

    def go_on(
        self, gateway: str, handoff_id: str, prefill: str, decode: str, num_more: int
    ) -> Message | None:
        """Another handoff after this one, for its tokens and those that decode has drawn: each is
        a 7. With `num_more` 1 it is where an honest gateway would go on."""
        handoff = self.ledger.handoffs[handoff_id]
        num_tokens = (handoff.num_computed or handoff.num_tokens) + num_more
        prompt = self.prompts[handoff_id]
        tokens = prompt[:num_tokens] + [7] * (num_tokens - len(prompt))
        return self.open(gateway, prefill, decode, tokens, after=handoff_id)

    def _went_on(self, gateway: str, message: OpenHandoff) -> None:
        former = self.ledger.handoffs.get(message.after)
        if former is not None and former.gateway_id == gateway:
            self.fenced.add(message.after)

    def abort(self, gateway: str, handoff_id: str) -> None:
        self.tell(gateway, AbortHandoff(handoff_id=handoff_id))

    # ---- a worker's: `epoch_shift` makes them stale ---------------------------------------------

    def _epoch(self, handoff_id: str, epoch_shift: int) -> int:
        handoff = self.ledger.handoffs.get(handoff_id)
        return (handoff.epoch if handoff is not None else 1) + epoch_shift

    def fill(self, sender: str, handoff_id: str, epoch_shift: int = 0) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(sender, Fill(handoff_id=handoff_id, epoch=epoch))

    def commit(
        self, sender: str, handoff_id: str, num_blocks: int = 1, epoch_shift: int = 0
    ) -> Message | None:
        """The next blocks of a handoff, with what `sender` has for them, as an honest worker would:
        first those of the block table, then spare ones."""
        handoff = self.ledger.handoffs.get(handoff_id)
        if handoff is None:
            return None
        first, keys = handoff.num_committed, list[bytes]()
        blocks = (handoff.blocks[first:] + self.spare(sender))[:num_blocks]
        if first < len(handoff.keys):
            blocks = blocks[: len(handoff.keys) - first]
        else:
            key = handoff.keys[-1] if handoff.keys else handoff.root_key
            for _ in blocks:
                key = block_key(key, [7, 7])
                keys.append(key)
        epoch = self._epoch(handoff_id, epoch_shift)
        commit = Commit(
            handoff_id=handoff_id, epoch=epoch, first_index=first, blocks=blocks, keys=keys
        )
        return self.tell(sender, commit)

    def seal(
        self, sender: str, handoff_id: str, *, finished: bool = False, epoch_shift: int = 0
    ) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(
            sender, Seal(handoff_id=handoff_id, epoch=epoch, first_token=5, finished=finished)
        )

    def claim(self, sender: str, handoff_id: str, epoch_shift: int = 0) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(sender, Claim(handoff_id=handoff_id, epoch=epoch))

    def release(self, sender: str, handoff_id: str, epoch_shift: int = 0) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(sender, Release(handoff_id=handoff_id, epoch=epoch))

    def suspend(
        self, sender: str, handoff_id: str, num_more_tokens: int = 0, epoch_shift: int = 0
    ) -> Message | None:
        handoff = self.ledger.handoffs.get(handoff_id)
        num_tokens = num_more_tokens + (handoff.num_tokens if handoff is not None else 1)
        return self.tell(
            sender,
            Suspend(
                call_id=self._call_id(),
                handoff_id=handoff_id,
                epoch=self._epoch(handoff_id, epoch_shift),
                num_tokens=num_tokens,
            ),
        )

    def yield_(
        self, sender: str, handoff_id: str, num_tokens: int, epoch_shift: int = 0
    ) -> Message | None:
        """With what an honest worker would have: a spare block if its last one is unfinished."""
        handoff = self.ledger.handoffs.get(handoff_id)
        rest: list[int] = []
        if handoff is not None and num_tokens % BLOCK_SIZE:
            rest = (handoff.blocks[handoff.num_committed :] + self.spare(sender))[:1]
        epoch = self._epoch(handoff_id, epoch_shift)
        message = Yield(handoff_id=handoff_id, epoch=epoch, num_tokens=num_tokens, blocks=rest)
        return self.tell(sender, message)

    def quit(self, sender: str, handoff_id: str, epoch_shift: int = 0) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(sender, Quit(handoff_id=handoff_id, epoch=epoch))

    def discard(
        self, sender: str, handoff_id: str, indexes: list[int], epoch_shift: int = 0
    ) -> Message | None:
        epoch = self._epoch(handoff_id, epoch_shift)
        return self.tell(sender, Discard(handoff_id=handoff_id, epoch=epoch, indexes=indexes))

    def lease(self, sender: str, num_blocks: int) -> None:
        self.tell(sender, Lease(num_blocks=num_blocks))

    def give_back(self, sender: str, blocks: list[int]) -> None:
        self.tell(sender, GiveBack(blocks=blocks))

    def spare(self, member: str) -> list[int]:
        """Leased blocks that are in no block table."""
        in_use = {
            block
            for handoff in self.ledger.handoffs.values()
            if handoff.writer == member
            for block in handoff.blocks
        }
        return sorted(self.held[member, ""] - in_use)

    def advance(self, handoff_id: str) -> None:
        """What an honest worker would do next with a handoff."""
        handoff = self.ledger.handoffs.get(handoff_id)
        if handoff is None:
            return
        num_full = handoff.num_tokens // BLOCK_SIZE
        match handoff.state:
            case HandoffState.RESERVED:
                by_decode = handoff_id in self.suspended
                self.fill(handoff.decode_id if by_decode else handoff.prefill_id, handoff_id)
            case HandoffState.FILLING if handoff.num_committed < num_full:
                self.commit(handoff.writer, handoff_id)
            case HandoffState.FILLING:
                self.seal(handoff.writer, handoff_id)
            case HandoffState.SEALED:
                self.claim(handoff.decode_id, handoff_id)
            case HandoffState.CLAIMED if handoff.num_committed <= num_full:
                self.commit(handoff.writer, handoff_id)
            case HandoffState.CLAIMED:
                self.release(handoff.writer, handoff_id)
            case HandoffState.ABORTING if handoff.writer in self.alive:
                self.quit(handoff.writer, handoff_id)

    # ---- life and death -------------------------------------------------------------------------

    def lose(self, member: str) -> None:
        """The member is not heard from. It may still be writing."""
        self.alive.remove(member)
        self.silent.add(member)
        self.unanswered = {call for call in self.unanswered if call[0] != member}
        self.broker.lose(member, "it was silent")
        self.ledger.lose_writer(member)
        self.broker.admit()

    def stop(self, member: str) -> None:
        """The member has ended, or says that it writes no more."""
        if member in self.alive:
            self.lose(member)
        self.silent.remove(member)
        for owner in [owner for owner in self.held if owner[0] == member]:
            del self.held[owner]
        self.fenced.update(
            handoff.handoff_id
            for handoff in self.ledger.handoffs.values()
            if handoff.gateway_id == member
        )
        self.ledger.member_stopped(member)
        self.broker.admit()

    def end(self) -> None:
        """Every request ends, every writer quits or stops: nothing may be left but cache."""
        for handoff in list(self.ledger.handoffs.values()):
            self.abort(handoff.gateway_id, handoff.handoff_id)
        for member in sorted(self.silent):
            self.stop(member)
        for handoff in list(self.ledger.handoffs.values()):
            self.quit(handoff.writer, handoff.handoff_id)
        for member in sorted(self.alive):
            self.give_back(member, sorted(self.held[member, ""]))
        self.check()
        assert self.ledger.handoffs == {}
        assert self.ledger.num_reserved == self.ledger.num_waiting == 0
        assert self.unanswered == set()
        counts = self.ledger.pool.counts()
        assert counts["free"] + counts["cached"] == self.ledger.pool.num_blocks

    # ---- invariants -----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that every block which somebody may write is known to the ledger as theirs."""
        self.ledger.check()
        self.ledger._no_room = None  # asked afresh, nobody who waits has room
        assert self.ledger.admit() == []
        pool = self.ledger.pool
        assert sum(pool.counts().values()) == pool.num_blocks
        assert all(self.content[block] == key for key, block in pool._index.items())
        self._check_readers()
        owners = self._owners()
        for block_id in range(pool.num_blocks):
            block = pool[block_id]
            if block_id not in owners:
                assert block.state not in (BlockState.GRANTED, BlockState.QUARANTINED)
                continue
            member, handoff_id = owners[block_id]
            if handoff_id:
                is_over = self.ledger.handoffs[handoff_id].state is HandoffState.ABORTING
            else:
                is_over = member in self.silent
                assert block.writer == member
            assert block.state is (BlockState.QUARANTINED if is_over else BlockState.GRANTED)

    def _check_readers(self) -> None:
        """What a worker reads for an aborted handoff stays what it is until nothing comes of it."""
        for handoff in self.ledger.handoffs.values():
            key = handoff.handoff_id, handoff.epoch
            if handoff.state in (HandoffState.FILLING, HandoffState.CLAIMED):
                final = handoff.blocks[: handoff.num_committed]
                self.reading[key] = [(block, self.ledger.pool[block].stamp) for block in final]
            elif handoff.state is HandoffState.ABORTING and handoff.handoff_id not in self.fenced:
                for block_id, stamp in self.reading.get(key, []):
                    block = self.ledger.pool[block_id]
                    assert (block.state, block.stamp) == (BlockState.COMMITTED, stamp)

    def _owners(self) -> dict[int, tuple[str, str]]:
        """Who may write each block, or for whom it waits; no block has two such."""
        owned = [(block, owner) for owner, blocks in self.held.items() for block in blocks]
        for handoff in self.ledger.handoffs.values():
            rest = handoff.blocks[handoff.num_committed :]
            if handoff.state in (HandoffState.SEALED, HandoffState.HELD):
                owned += [(block, ("", handoff.handoff_id)) for block in rest]
            if handoff.state is HandoffState.WAITING:
                assert len(handoff.blocks) == handoff.num_committed
            if handoff.state is HandoffState.ABORTING:
                assert handoff.writer in self.alive | self.silent
                continue
            for block, key in zip(handoff.blocks, handoff.keys, strict=False):
                if block not in rest:
                    assert self.content[block] == key
        owners = dict(owned)
        assert len(owners) == len(owned)
        return owners
