"""The ledger against members that do anything in any order: what they believe to hold is theirs."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from common.messages import Commit
from services.kvstore.handoff import Handoff, HandoffState
from tests.unit.ledger_wire import WireWorld
from tests.unit.ledger_world import BLOCK_SIZE, LedgerWorld

MEMBERS = ["gateway-1", "gateway-2", "prefill-1", "prefill-2", "decode-1", "decode-2"]
MOST_LOSSES = 4

NUMBERS = st.integers(0, 11)  # which of those there are, in turn
SHIFTS = st.sampled_from([0, 0, 0, -1, 1])
PROMPTS = st.tuples(st.sampled_from([5, 6]), st.integers(1, 9), st.booleans()).map(
    lambda drawn: [drawn[0]] * drawn[1] + [8] * drawn[2]
)


class LedgerMachine(RuleBasedStateMachine):
    """Steps that are due come often, strange ones now and then; none may break the books."""

    make_world: type[LedgerWorld] = LedgerWorld

    @initialize(num_blocks=st.integers(3, 12), growth_blocks=st.integers(1, 2))
    def begin(self, num_blocks: int, growth_blocks: int) -> None:
        self.world = self.make_world(num_blocks, MEMBERS, growth_blocks=growth_blocks)
        self.num_losses = 0

    def one(self, role: str, number: int) -> str:
        """A living member of a role, or of any of several."""
        members = sorted(member for member in self.world.alive if member.split("-")[0] in role)
        return members[number % len(members)]

    def handoff(self, number: int) -> Handoff:
        handoffs = list(self.world.ledger.handoffs.values())
        return handoffs[number % len(handoffs)]

    def has_handoffs(self) -> bool:
        return bool(self.world.ledger.handoffs)

    # ---- what is due ----------------------------------------------------------------------------

    @rule(gateway=NUMBERS, prefill=NUMBERS, decode=NUMBERS, tokens=PROMPTS, num_steps=NUMBERS)
    def serve(
        self, gateway: int, prefill: int, decode: int, tokens: list[int], num_steps: int
    ) -> None:
        """A request, and its first steps at once."""
        before = set(self.world.ledger.handoffs)
        self.world.open(
            self.one("gateway", gateway),
            self.one("prefill", prefill),
            self.one("decode", decode),
            tokens,
        )
        for handoff_id in set(self.world.ledger.handoffs) - before:
            for _ in range(num_steps):
                self.world.advance(handoff_id)

    @precondition(has_handoffs)
    @rule(number=NUMBERS, num_steps=st.integers(1, 6))
    def advance(self, number: int, num_steps: int) -> None:
        handoff_id = self.handoff(number).handoff_id
        for _ in range(num_steps):
            self.world.advance(handoff_id)
            self.world.check()

    @rule(decode=NUMBERS, num_blocks=st.integers(-1, 4))
    def lease(self, decode: int, num_blocks: int) -> None:
        self.world.lease(self.one("decode", decode), num_blocks)

    @rule(decode=NUMBERS)
    def give_back(self, decode: int) -> None:
        member = self.one("decode", decode)
        self.world.give_back(member, self.world.spare(member))

    @precondition(has_handoffs)
    @rule(number=NUMBERS, gateway=NUMBERS)
    def abort(self, number: int, gateway: int) -> None:
        """By its own gateway, mostly."""
        handoff = self.handoff(number)
        stranger = self.one("gateway", gateway)
        self.world.abort(stranger if gateway == 0 else handoff.gateway_id, handoff.handoff_id)

    @precondition(has_handoffs)
    @rule(number=NUMBERS, num_more=st.integers(-2, 5))
    def suspend(self, number: int, num_more: int) -> None:
        handoff = self.handoff(number)
        self.world.suspend(handoff.decode_id, handoff.handoff_id, num_more)

    @precondition(has_handoffs)
    @rule(number=NUMBERS, num_tokens=st.none() | st.integers(0, 9))
    def yield_(self, number: int, num_tokens: int | None) -> None:
        """Decode hands on what it has; mostly as much as it has said is final, and a token more."""
        handoff = self.handoff(number)
        if num_tokens is None:
            num_tokens = handoff.num_committed * BLOCK_SIZE + 1
        self.world.yield_(handoff.decode_id, handoff.handoff_id, num_tokens)

    @precondition(has_handoffs)
    @rule(
        number=NUMBERS,
        gateway=st.none() | NUMBERS,
        workers=st.tuples(NUMBERS, NUMBERS),
        num_more=st.sampled_from([1, 1, 1, 0, -1, 2]),
        num_steps=NUMBERS,
    )
    def go_on(
        self, number: int, gateway: int | None, workers: tuple[int, int], num_more: int,
        num_steps: int,
    ) -> None:  # fmt: skip
        """The same request elsewhere, asked for by its own gateway, mostly."""
        handoff, before = self.handoff(number), set(self.world.ledger.handoffs)
        sender = handoff.gateway_id if gateway is None else self.one("gateway", gateway)
        if sender not in self.world.alive:
            return
        prefill_id, decode_id = self.one("prefill", workers[0]), self.one("decode", workers[1])
        self.world.go_on(sender, handoff.handoff_id, prefill_id, decode_id, num_more)
        for handoff_id in set(self.world.ledger.handoffs) - before:
            for _ in range(num_steps):
                self.world.advance(handoff_id)

    def is_ending(self) -> bool:
        return any(
            each.state is HandoffState.ABORTING for each in self.world.ledger.handoffs.values()
        )

    @precondition(is_ending)
    @rule(number=NUMBERS)
    def fence(self, number: int) -> None:
        """A gateway says that it takes no more of what was aborted."""
        handoffs = self.world.ledger.handoffs.values()
        ending = [each for each in handoffs if each.state is HandoffState.ABORTING]
        handoff = ending[number % len(ending)]
        self.world.abort(handoff.gateway_id, handoff.handoff_id)

    @precondition(has_handoffs)
    @rule(number=NUMBERS, by_decode=st.booleans(), indexes=st.lists(st.integers(0, 2), max_size=2))
    def discard(self, number: int, by_decode: bool, indexes: list[int]) -> None:
        """A worker has got bytes that are not right."""
        handoff = self.handoff(number)
        worker = handoff.decode_id if by_decode else handoff.prefill_id
        self.world.discard(worker, handoff.handoff_id, indexes)

    # ---- what is not ----------------------------------------------------------------------------

    @rule(gateway=NUMBERS, prefill=NUMBERS, decode=NUMBERS, tokens=PROMPTS)
    def open_for_any_workers(
        self, gateway: int, prefill: int, decode: int, tokens: list[int]
    ) -> None:
        workers = "prefill decode"
        self.world.open(
            self.one("gateway", gateway), self.one(workers, prefill), self.one(workers, decode),
            tokens,
        )  # fmt: skip

    @precondition(has_handoffs)
    @rule(
        number=NUMBERS,
        sender=st.none() | NUMBERS,
        shift=SHIFTS,
        step=st.sampled_from(["fill", "commit", "seal", "claim", "release", "suspend", "quit"]),
    )
    def any_step(self, number: int, sender: int | None, shift: int, step: str) -> None:
        """By decode, or by anyone; of this epoch, or of another."""
        handoff = self.handoff(number)
        member = handoff.decode_id if sender is None else self.one("prefill decode", sender)
        getattr(self.world, step)(member, handoff.handoff_id, epoch_shift=shift)

    @precondition(has_handoffs)
    @rule(number=NUMBERS, sender=NUMBERS, indexes=st.lists(st.integers(0, 9)), shift=SHIFTS)
    def discard_anything(self, number: int, sender: int, indexes: list[int], shift: int) -> None:
        member = self.one("prefill decode", sender)
        self.world.discard(member, self.handoff(number).handoff_id, indexes, epoch_shift=shift)

    @rule(sender=NUMBERS, blocks=st.lists(st.integers(-2, 13), max_size=4))
    def give_back_any_blocks(self, sender: int, blocks: list[int]) -> None:
        self.world.give_back(self.one("prefill decode", sender), blocks)

    @precondition(has_handoffs)
    @rule(
        number=NUMBERS,
        sender=st.none() | NUMBERS,
        first_index=st.none() | st.integers(-1, 4),
        blocks=st.sampled_from(["due", "last"]) | st.lists(st.integers(-1, 12), max_size=3),
        keys=st.lists(st.sampled_from([b"x", b"y", b"z"]), max_size=3),
    )
    def commit_anything(
        self,
        number: int,
        sender: int | None,
        first_index: int | None,
        blocks: str | list[int],
        keys: list[bytes],
    ) -> None:
        """Where nothing is drawn it is what would be right."""
        handoff = self.handoff(number)
        member = handoff.writer if sender is None else self.one("prefill decode", sender)
        if member not in self.world.alive:
            return
        if isinstance(blocks, str):
            held = handoff.blocks[handoff.num_committed :] + self.world.spare(member)
            blocks = held[: len(keys)] if blocks == "due" else handoff.blocks[-1:]
        message = Commit(
            handoff_id=handoff.handoff_id,
            epoch=handoff.epoch,
            first_index=handoff.num_committed if first_index is None else first_index,
            blocks=blocks,
            keys=keys,
        )
        self.world.tell(member, message)

    # ---- life and death -------------------------------------------------------------------------

    @precondition(lambda self: self.num_losses < MOST_LOSSES)
    @rule(number=NUMBERS, dead=st.booleans())
    def lose(self, number: int, dead: bool) -> None:
        """Another of its kind joins at once, so that there is always one."""
        member = self.one("gateway prefill decode", number)
        self.num_losses += 1
        self.world.alive.add(f"{member.split('-')[0]}-new-{self.num_losses}")
        if dead:
            self.world.stop(member)
        else:
            self.world.lose(member)

    @precondition(lambda self: self.world.silent)
    @rule(number=NUMBERS)
    def stop(self, number: int) -> None:
        members = sorted(self.world.silent)
        self.world.stop(members[number % len(members)])

    @invariant()
    def books_agree(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


class WireMachine(LedgerMachine):
    """The same over a network that loses, repeats and delays: order is kept by numbers."""

    make_world = WireWorld

    @property
    def wire(self) -> WireWorld:
        assert isinstance(self.world, WireWorld)
        return self.world

    @rule(fates=st.lists(st.sampled_from(["", "late", "late", "lost"]), min_size=1, max_size=3))
    def disturb(self, fates: list[str]) -> None:
        """The next messages do not come as they were sent."""
        self.wire.fates.extend(fates)

    @precondition(lambda self: self.wire.late)
    @rule(number=NUMBERS)
    def arrive_late(self, number: int) -> None:
        self.wire.arrive(self.wire.late.pop(number % len(self.wire.late)))

    @precondition(lambda self: self.wire.sent)
    @rule(number=NUMBERS, back=st.integers(0, 30))
    def arrive_again(self, number: int, back: int) -> None:
        """One of the last, or any before."""
        sent = self.wire.sent
        self.wire.arrive(sent[-1 - number % len(sent)] if back else sent[number % len(sent)])


LedgerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
)
WireMachine.TestCase.settings = settings(LedgerMachine.TestCase.settings, max_examples=100)
# Only a failure takes long: it is reduced to the shortest history that shows it.
TestAnyMessagesInAnyOrder = pytest.mark.timeout(400)(LedgerMachine.TestCase)
TestMessagesLostAndLateAndAgain = pytest.mark.timeout(400)(WireMachine.TestCase)
