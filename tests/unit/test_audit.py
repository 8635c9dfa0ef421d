"""The audit finds each discrepancy, names it in words, and finds none in books that close."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import (
    AbortHandoff,
    Commit,
    HeldSequence,
    Holdings,
    Lease,
    Leased,
    Member,
    Quit,
    Release,
    StaleError,
)
from kvbaton.admin import MAX_ROWS
from services.kvstore.audit import View, check_books, compare, view_of
from services.kvstore.audit_rows import standing_of_block, standing_of_requests, store_audit
from services.kvstore.blocks import BlockState
from services.kvstore.ledger import Ledger
from tests.unit.broker_store import DECODE, GATEWAY, PREFILL, Store

MEMBERS = {GATEWAY, PREFILL, DECODE}


def busy_store() -> Store:
    """Decode works on the first handoff and has a lease; prefill fills the second."""
    store = Store(num_blocks=12)
    store.claim()
    store.worker(DECODE, Lease(num_blocks=2))
    store.open([9, 9, 9])
    store.ledger.fill("h2", 1, PREFILL)
    return store


def books(ledger: Ledger) -> list[str]:
    return check_books(ledger, MEMBERS.__contains__)


def test_the_books_of_a_busy_store_close() -> None:
    store = busy_store()
    assert books(store.ledger) == []
    store.broker.lose(DECODE, "it was silent")
    store.broker.lose_writer(DECODE)
    assert books(store.ledger) == []


def test_the_books_close_while_the_disk_has_blocks_in_hand() -> None:
    store = busy_store()
    ledger, staging = store.ledger, store.ledger.staging
    final = ledger.handoffs["h1"].blocks[: ledger.handoffs["h1"].num_committed]
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    ((block, _),) = staging.take_cold(1, lambda _key: False)
    staging.hold(final)
    (empty,) = staging.take_free(1)
    assert ledger.pool[block].num_readers == 2
    ledger.check()
    assert books(ledger) == []
    staging.written([block])
    staging.loaded([empty], [None])
    assert books(ledger) == []
    staging.let_go()
    ledger.check()
    assert books(ledger) == []


def test_an_empty_name_is_nobodys() -> None:
    ledger = busy_store().ledger
    assert standing_of_requests(ledger, ["", "nobody"]) == ""
    assert standing_of_requests(ledger, ["h1"]) == "handoff h1 is claimed"


def lose_a_reader(ledger: Ledger) -> None:
    ledger.handoffs["h1"].num_committed = 1


def forget_a_handoff(ledger: Ledger) -> None:
    del ledger.handoffs["h2"]


def miscount(ledger: Ledger) -> None:
    ledger.pool._counts[BlockState.FREE] += 1


def grant_to_a_stranger(ledger: Ledger) -> None:
    ledger.pool.grant(1, "nobody")


def grant_behind_the_table(ledger: Ledger) -> None:
    ledger.pool.grant(1, "h2")


def list_a_foreign_block(ledger: Ledger) -> None:
    ledger.handoffs["h2"].blocks.append(11)


def reserve_nothing(ledger: Ledger) -> None:
    ledger.num_reserved += 1


def reserve_too_much(ledger: Ledger) -> None:
    ledger.num_reserved = ledger.handoffs["h2"].num_reserved = 100


def lose_a_free_block(ledger: Ledger) -> None:
    ledger.pool._free.pop()


def write_to_free(ledger: Ledger) -> None:
    ledger.pool[11].writer = DECODE


def mix_up_the_index(ledger: Ledger) -> None:
    first, second = ledger.handoffs["h1"].blocks[:2]
    ledger.pool[first].name, ledger.pool[second].name = (
        ledger.pool[second].name,
        ledger.pool[first].name,
    )


def read_what_is_free(ledger: Ledger) -> None:
    ledger.pool[11].num_readers = 1


PLANTED: dict[Callable[[Ledger], None], str] = {
    lose_a_reader: "counts 1 readers, handoffs and the disk account for 0",
    forget_a_handoff: "because of h2, which is neither a handoff nor a member",
    miscount: "free, 5 are in that state",
    grant_to_a_stranger: "granted because of nobody, which is neither a handoff nor a member",
    grant_behind_the_table: "is granted to handoff h2, whose table does not hold it",
    list_a_foreign_block: "handoff h2 lists block 11, which is not granted to it",
    reserve_nothing: "1 blocks are counted as reserved, handoffs reserve 0",
    reserve_too_much: "100 blocks are reserved, 5 could be granted",
    lose_a_free_block: "4 blocks can be granted as free, 5 are free",
    write_to_free: "block 11 is free and written by decode",
    mix_up_the_index: "has a key that finds block",
    read_what_is_free: "block 11 is free with 1 readers",
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_discrepancy_is_found(plant: Callable[[Ledger], None]) -> None:
    ledger = busy_store().ledger
    plant(ledger)
    found = books(ledger)
    assert any(PLANTED[plant] in line for line in found), found


# ---- what a worker says -------------------------------------------------------------------------


def truth(view: View) -> Holdings:
    """What a worker says that sees everything as the store does."""
    sequences = [
        HeldSequence(
            handoff_id=handoff_id,
            epoch=table.epoch,
            blocks=list(table.blocks),
            num_committed=table.num_committed,
        )
        for handoff_id, table in view.tables.items()
    ]
    held = {block for sequence in sequences for block in sequence.blocks}
    spare = [block for block in view.writable if block not in held]
    return Holdings(audit_id=1, sequences=sequences, spare=spare)


@pytest.mark.parametrize("member", [PREFILL, DECODE])
def test_a_worker_that_sees_what_the_store_sees_agrees(member: str) -> None:
    view = view_of(busy_store().ledger, member)
    assert len(view.tables) == 1
    assert compare(view, truth(view), view) == []


def difference(change: Callable[[Holdings], object], member: str = DECODE) -> str:
    """What is found once the truth was changed; it must be one thing."""
    view = view_of(busy_store().ledger, member)
    said = truth(view)
    change(said)
    (found,) = compare(view, said, view)
    return found


def test_a_block_that_the_worker_does_not_know_of_is_found() -> None:
    assert "which it does not know of" in difference(lambda said: said.spare.pop())


def test_a_block_that_was_never_granted_is_found() -> None:
    assert "it may write block 11 as it says" in difference(lambda said: said.spare.append(11))


def test_a_block_in_two_places_is_found() -> None:
    assert "in 2 places" in difference(lambda said: said.spare.append(said.spare[0]))


def changed(said: Holdings, **fields: object) -> None:
    (sequence,) = said.sequences
    values = {name: getattr(sequence, name) for name in sequence.__struct_fields__}
    said.sequences[:] = [HeldSequence(**(values | fields))]


def test_a_handoff_that_the_store_does_not_know_is_found() -> None:
    view = view_of(busy_store().ledger, DECODE)
    said = truth(view)
    changed(said, handoff_id="h9")
    assert [line[:30] for line in compare(view, said, view)] == [
        "the store has it hold handoff ",
        "it works on handoff h9, of whi",
    ]


def test_fewer_final_blocks_than_the_store_has_are_found() -> None:
    found = compare_changed(num_committed=1)
    assert "it has 1 final blocks of handoff h1, the store 2" in found


def test_other_final_blocks_than_the_stores_are_found() -> None:
    view = view_of(busy_store().ledger, DECODE)
    blocks = list(view.tables["h1"].blocks)
    blocks[:2] = reversed(blocks[:2])
    assert compare_changed(blocks=blocks) == [
        "the final blocks of handoff h1 are others than the store's"
    ]


def compare_changed(**fields: object) -> list[str]:
    view = view_of(busy_store().ledger, DECODE)
    said = truth(view)
    changed(said, **fields)
    return compare(view, said, view)


def test_what_was_under_way_while_the_worker_was_asked_is_no_discrepancy() -> None:
    store = busy_store()
    asked = view_of(store.ledger, DECODE)
    leased = store.worker(DECODE, Lease(num_blocks=1))
    assert isinstance(leased, Leased)
    said = truth(asked)
    before_it_came, after_it_came = truth(asked), truth(view_of(store.ledger, DECODE))
    answered = view_of(store.ledger, DECODE)
    for said in (before_it_came, after_it_came):
        assert compare(asked, said, answered) == []
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    after_the_release = view_of(store.ledger, DECODE)
    for said in (after_it_came, truth(after_the_release)):
        assert compare(answered, said, after_the_release) == []


def test_a_block_granted_anew_meanwhile_need_not_be_known() -> None:
    store = busy_store()
    asked = view_of(store.ledger, DECODE)
    said = truth(asked)
    block = said.spare.pop()
    store.ledger.give_back(DECODE, [block])
    while block not in store.ledger.lease(DECODE, 1):
        pass
    answered = view_of(store.ledger, DECODE)
    assert f"block {block}," not in " ".join(compare(asked, said, answered))


@settings(max_examples=50)
@given(st.data())
def test_a_worker_is_right_at_each_moment_between_question_and_answer(data: st.DataObject) -> None:
    """It says what the store sees at some moment between the two."""
    store = busy_store()
    filled = store.ledger.handoffs["h1"].blocks[2:]
    last = Commit(handoff_id="h1", epoch=1, first_index=2, blocks=filled, keys=[b"key"])
    steps: list[Callable[[], object]] = [
        lambda: store.worker(DECODE, Lease(num_blocks=1)),
        lambda: store.worker(DECODE, Release(handoff_id="h1", epoch=1)),
        lambda: store.worker(DECODE, Quit(handoff_id="h1", epoch=1)),
        lambda: store.broker.lose(GATEWAY, "it was silent"),
        lambda: store.worker(DECODE, last),
    ]
    views = [view_of(store.ledger, DECODE)]
    for step in data.draw(st.permutations(steps)):
        with contextlib.suppress(StaleError):
            step()
        assert books(store.ledger) == []
        views.append(view_of(store.ledger, DECODE))
    first, said, last = sorted(data.draw(st.tuples(*[st.integers(0, len(views) - 1)] * 3)))
    assert compare(views[first], truth(views[said]), views[last]) == []


# ---- rows ---------------------------------------------------------------------------------------


def member(member_id: str) -> Member:
    return Member(member_id=member_id, role=member_id, name=f"{member_id}.1", host_id="", pid=1)


def test_the_rows_name_owners_and_what_is_waited_for() -> None:
    store = busy_store()
    store.gateway(AbortHandoff(handoff_id="h2"))
    store.broker.lose(DECODE, "it was silent")
    store.broker.lose_writer(DECODE)
    audit = store_audit(
        store.ledger,
        [member(PREFILL), member(GATEWAY)],
        [member(DECODE)],
        {PREFILL: "agrees"},
        name=lambda member_id: f"{member_id}.1",
        ages={"h1": 2.5, "h2": 1.0},
        discrepancies=[str(number) for number in range(MAX_ROWS + 5)],
        warnings=[],
    )
    assert sum(audit.blocks.values()) == audit.num_blocks == 12
    prefill, decode = audit.members
    assert (prefill.num_granted, prefill.num_quarantined, prefill.answer) == (0, 2, "agrees")
    assert prefill.waits_for == "prefill.1 must end its step"
    assert (decode.state, decode.num_leased, len(decode.quarantined)) == ("lost", 0, 3)
    assert decode.waits_for == "decode.1 must end, or come back and say that it has stopped"
    first, second = audit.oldest_handoffs
    assert (first.handoff_id, first.age_s) == ("h1", 2.5)
    assert first.waits_for == "decode.1 to quit or end, gateway.1 to confirm or end"
    assert second.waits_for == "prefill.1 to quit or end"
    assert audit.handoffs["aborting"] == 2
    assert len(audit.discrepancies) == MAX_ROWS
    assert audit.discrepancies[-1] == "and 6 more"


def test_a_block_says_how_it_stands() -> None:
    store = busy_store()
    blocks = store.ledger.handoffs["h1"].blocks
    name = {DECODE: "decode.1", PREFILL: "prefill.1"}.__getitem__
    final = standing_of_block(store.ledger, blocks[0], name)
    assert final == "committed, stamp 1, read by 1, can be found by its key"
    last = standing_of_block(store.ledger, blocks[2], name)
    assert last == "granted, stamp 2, may be written by decode.1"
    filled = store.ledger.handoffs["h2"].blocks[0]
    text = standing_of_block(store.ledger, filled, name)
    assert text == "granted, stamp 1, may be written by prefill.1"
    assert standing_of_block(store.ledger, 12, name).endswith("numbered from 0 to 11")
