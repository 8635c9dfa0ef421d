"""The broker by value: who is told what on the way from prefill to decode, and when."""

from __future__ import annotations

import pytest

from common.messages import (
    AbortHandoff,
    Claim,
    Commit,
    Discard,
    Fill,
    Filled,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Release,
    Seal,
    Sealed,
    Suspend,
)
from kvbaton.errors import UnavailableError
from tests.unit.broker_store import (
    DECODE,
    GATEWAY,
    PREFILL,
    Store,
    aborted,
)

# ---- opening ------------------------------------------------------------------------------------


def test_an_open_is_answered_when_there_is_room() -> None:
    store = Store()
    store.open([1] * 12, call_id=7)
    assert store.sent() == [
        (GATEWAY, HandoffOpened(call_id=7, handoff_id="h1", epoch=1, num_cached_blocks=0))
    ]
    store.open([2] * 12, call_id=8)
    assert store.sent() == []
    store.gateway(AbortHandoff(handoff_id="h1"))
    assert (
        GATEWAY,
        HandoffOpened(call_id=8, handoff_id="h2", epoch=1, num_cached_blocks=0),
    ) in store.sent()


def test_the_answer_tells_how_much_is_cached() -> None:
    store = Store()
    store.claim()
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    store.open(call_id=8)
    [(_, opened)] = store.sent()
    assert isinstance(opened, HandoffOpened)
    assert opened.num_cached_blocks == 2


@pytest.mark.parametrize("gone", [PREFILL, DECODE])
def test_a_handoff_with_a_worker_that_has_gone_is_refused(gone: str) -> None:
    store = Store()
    del store.roles[gone]
    with pytest.raises(UnavailableError, match="has gone") as refused:
        store.open()
    assert refused.value.retry_after_s == 1
    assert store.ledger.handoffs == {}


# ---- from prefill to decode ---------------------------------------------------------------------


def test_prefill_gets_the_block_table_and_what_is_known_of_its_keys() -> None:
    store = Store()
    store.open()
    assert store.worker(PREFILL, Fill(handoff_id="h1", epoch=1)) == Granted(
        blocks=[0, 1, 2], num_committed=0, num_keys=2
    )


def test_a_prompt_without_a_full_block_has_no_key() -> None:
    store = Store()
    store.open([1])
    granted = store.worker(PREFILL, Fill(handoff_id="h1", epoch=1))
    assert granted == Granted(blocks=[0], num_committed=0, num_keys=0)


def test_decode_on_the_same_host_is_not_told_of_each_block() -> None:
    store = Store()
    blocks = store.fill()
    store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:2]))
    assert store.sent() == []


def test_decode_that_must_pull_is_told_of_blocks_as_they_become_final() -> None:
    store = Store(pulling=DECODE)
    blocks = store.fill()
    store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:1]))
    store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=1, blocks=blocks[1:2]))
    assert store.sent() == [
        (DECODE, Filled(handoff_id="h1", epoch=1, first_index=0, blocks=[0], stamps=[1])),
        (DECODE, Filled(handoff_id="h1", epoch=1, first_index=1, blocks=[1], stamps=[1])),
    ]


def test_decode_that_must_pull_is_told_of_cached_blocks_first() -> None:
    store = Store(pulling=DECODE)
    blocks = store.claim()
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    store.open()
    store.sent()
    store.worker(PREFILL, Fill(handoff_id="h2", epoch=1))
    assert store.sent() == [
        (
            DECODE,
            Filled(handoff_id="h2", epoch=1, first_index=0, blocks=blocks[:2], stamps=[1, 1]),
        )
    ]


@pytest.mark.parametrize("who", [PREFILL, DECODE])
def test_who_moves_bytes_is_told_the_stamps_of_its_blocks(who: str) -> None:
    """A block that changes hands or is granted anew has another."""
    store = Store(pulling=who)
    store.open()
    filled = store.worker(PREFILL, Fill(handoff_id="h1", epoch=1))
    assert isinstance(filled, Granted)
    assert filled.stamps == ([1, 1, 1] if who == PREFILL else [])
    for index in range(2):
        blocks = filled.blocks[index : index + 1]
        store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=index, blocks=blocks))
    store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9))
    claimed = store.worker(DECODE, Claim(handoff_id="h1", epoch=1))
    assert isinstance(claimed, Granted)
    assert claimed.stamps == ([1, 1, 2] if who == DECODE else [])
    leased = store.worker(DECODE, Lease(num_blocks=1))
    assert leased == Leased(blocks=[3], stamps=[1] if who == DECODE else [])
    store.worker(DECODE, GiveBack(blocks=[3, 2]))
    for blocks, stamps in (([4], [1]), ([5, 6, 7, 3, 2], [1, 1, 1, 2, 3])):
        leased = store.worker(DECODE, Lease(num_blocks=len(blocks)))
        assert leased == Leased(blocks=blocks, stamps=stamps if who == DECODE else [])


def test_what_came_corrupt_is_not_found_by_the_next() -> None:
    store = Store(pulling=DECODE)
    store.claim()
    assert store.worker(DECODE, Discard(handoff_id="h1", epoch=1, indexes=[1])) is None
    assert store.broker.num_corrupt == 1
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    store.open(call_id=8)
    [(_, opened)] = store.sent()
    assert isinstance(opened, HandoffOpened)
    assert opened.num_cached_blocks == 1


def test_a_seal_tells_decode_to_claim_and_which_token_was_drawn() -> None:
    store = Store()
    store.fill()
    store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9))
    assert store.sent() == [(DECODE, Sealed(handoff_id="h1", epoch=1, first_token=9))]


def test_the_seal_of_a_finished_request_lets_decode_give_up_its_place() -> None:
    store = Store()
    store.fill()
    store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9, finished=True))
    assert store.sent() == [(DECODE, aborted("finished"))]
    assert store.ledger.handoffs == {}


def test_a_claim_is_answered_with_the_table() -> None:
    store = Store()
    blocks = store.fill()
    store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:2]))
    store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9))
    granted = store.worker(DECODE, Claim(handoff_id="h1", epoch=1))
    assert isinstance(granted, Granted)
    assert (granted.blocks, granted.num_committed) == (blocks, 2)


def test_decode_leases_and_gives_back() -> None:
    store = Store()
    assert store.worker(DECODE, Lease(num_blocks=2)) == Leased(blocks=[0, 1])
    assert store.worker(DECODE, GiveBack(blocks=[0, 1])) is None
    assert store.ledger.pool.counts()["free"] == 8


def test_blocks_given_back_let_the_next_in() -> None:
    store = Store()
    store.worker(DECODE, Lease(num_blocks=4))
    store.open([1] * 12)
    assert store.sent() == []
    store.worker(DECODE, GiveBack(blocks=[0, 1, 2, 3]))
    [(member, opened)] = store.sent()
    assert (member, type(opened)) == (GATEWAY, HandoffOpened)


def test_a_suspended_decode_worker_is_answered_when_there_is_room_again() -> None:
    store = Store()
    blocks = store.claim()
    store.open([7] * 8, call_id=8)  # takes all that is left, but for growth
    store.worker(DECODE, Lease(num_blocks=1))
    store.sent()
    suspend = Suspend(call_id=3, handoff_id="h1", epoch=1, num_tokens=6)
    assert store.worker(DECODE, suspend) is None
    assert store.sent() == []
    store.worker(DECODE, GiveBack(blocks=[*blocks[2:], 3]))
    assert store.sent() == [
        (DECODE, HandoffOpened(call_id=3, handoff_id="h1", epoch=2, num_cached_blocks=2))
    ]
