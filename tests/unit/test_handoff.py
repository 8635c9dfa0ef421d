"""The steps of a handoff by value: who may take them, and what they do to its blocks."""

from __future__ import annotations

import pytest

from common.kv.hashing import prompt_keys
from common.messages import StaleError
from services.kvstore.handoff import HandoffState
from tests.unit.ledgers import (
    DECODE,
    PREFILL,
    ROOT,
    TENANT,
    claimed,
    commit,
    counts,
    filling,
    ledger_of,
    opened,
    sealed,
    waiting,
)

# ---- filling -------------------------------------------------------------------------------------


def test_fill_grants_what_was_reserved() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    assert (handoff.state, handoff.writer) == (HandoffState.FILLING, PREFILL)
    assert len(handoff.blocks) == 2
    assert ledger.num_reserved == 0
    assert counts(ledger) == {"free": 6, "granted": 2}


def test_a_fill_said_twice_gives_the_same_blocks() -> None:
    ledger = ledger_of()
    blocks = list(filling(ledger, [1, 2, 3]).blocks)
    assert ledger.fill("h1", 1, PREFILL).blocks == blocks
    assert counts(ledger)["granted"] == 2


def test_decode_that_fills_by_itself_owns_the_handoff_at_once() -> None:
    ledger = ledger_of()
    handoff = ledger.fill(opened(ledger, [1, 2, 3]).handoff_id, 1, DECODE)
    assert (handoff.state, handoff.writer) == (HandoffState.CLAIMED, DECODE)
    assert all(ledger.pool.is_granted(block, DECODE) for block in handoff.blocks)


def test_only_the_workers_of_a_handoff_may_fill_it() -> None:
    ledger = ledger_of()
    opened(ledger, [1])
    with pytest.raises(StaleError, match="not the worker"):
        ledger.fill("h1", 1, "another")


def test_a_handoff_that_still_waits_cannot_be_filled() -> None:
    ledger = ledger_of()
    waiting(ledger, [1])
    with pytest.raises(StaleError, match="is waiting, not reserved"):
        ledger.fill("h1", 1, PREFILL)


@pytest.mark.parametrize("epoch", [0, 2])
def test_another_epoch_is_refused(epoch: int) -> None:
    ledger = ledger_of()
    opened(ledger, [1])
    with pytest.raises(StaleError, match=f"is at epoch 1, not {epoch}"):
        ledger.fill("h1", epoch, PREFILL)


def test_an_unknown_handoff_is_over() -> None:
    with pytest.raises(StaleError, match="over"):
        ledger_of().fill("h1", 1, PREFILL)


# ---- committing ----------------------------------------------------------------------------------


def test_committed_blocks_carry_the_keys_of_the_prompt() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4, 5])
    commit(ledger, handoff, num_blocks=2)
    assert handoff.num_committed == 2
    assert ledger.pool.lookup(prompt_keys(ROOT, [1, 2, 3, 4], 2)) == handoff.blocks[:2]
    assert counts(ledger) == {"free": 5, "committed": 2, "granted": 1}
    first, second = prompt_keys(ROOT, [1, 2, 3, 4], 2)
    assert ledger.pool[handoff.blocks[0]].name == (first, ROOT, TENANT)
    assert ledger.pool[handoff.blocks[1]].name == (second, first, TENANT)


def test_a_commit_said_twice_changes_nothing() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4])
    commit(ledger, handoff)
    ledger.commit("h1", 1, PREFILL, first_index=0, blocks=handoff.blocks[:1], keys=[])
    assert handoff.num_committed == 1
    assert ledger.pool[handoff.blocks[0]].num_readers == 1


def test_commits_must_follow_one_another() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4])
    with pytest.raises(StaleError, match="follow one another"):
        ledger.commit("h1", 1, PREFILL, first_index=1, blocks=handoff.blocks[1:], keys=[])


def test_a_block_without_a_key_cannot_be_committed() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    with pytest.raises(StaleError, match="each block with its key"):
        ledger.commit("h1", 1, PREFILL, first_index=0, blocks=handoff.blocks, keys=[])


def test_blocks_must_be_committed_in_the_order_of_the_table() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4])
    with pytest.raises(StaleError, match="other than those of this handoff"):
        ledger.commit("h1", 1, PREFILL, first_index=0, blocks=handoff.blocks[::-1], keys=[])


def test_the_blocks_of_another_handoff_cannot_be_committed() -> None:
    ledger = ledger_of()
    foreign = filling(ledger, [1, 2]).blocks
    filling(ledger, [3, 4])
    with pytest.raises(StaleError, match="other than those of this handoff"):
        ledger.commit("h2", 1, PREFILL, first_index=0, blocks=foreign, keys=[])


def test_keys_that_contradict_the_prompt_are_refused() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4])
    with pytest.raises(StaleError, match="other than those of this handoff"):
        ledger.commit("h1", 1, PREFILL, first_index=0, blocks=handoff.blocks[:1], keys=[b"mine"])


def test_only_the_writer_may_commit() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2])
    with pytest.raises(StaleError, match="not the writer"):
        commit(ledger, handoff, DECODE)


def test_decode_commits_blocks_it_leased_with_keys_of_its_own() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    leased = ledger.lease(DECODE, 1)
    blocks = handoff.blocks[1:] + leased
    ledger.commit("h1", 1, DECODE, first_index=1, blocks=blocks, keys=[b"k1", b"k2"])
    assert handoff.keys[1:] == [b"k1", b"k2"]
    assert ledger.pool[leased[0]].name == (b"k2", b"k1", TENANT)
    assert handoff.blocks[1:] == blocks


def test_keys_may_begin_with_those_that_are_known() -> None:
    ledger = ledger_of()
    handoff = ledger.fill(opened(ledger, [1, 2, 3]).handoff_id, 1, DECODE)
    keys = [*prompt_keys(ROOT, [1, 2], 2), b"k1"]
    ledger.commit("h1", 1, DECODE, first_index=0, blocks=list(handoff.blocks), keys=keys)
    assert handoff.keys == keys


def test_decode_cannot_commit_a_block_twice_nor_one_that_is_free() -> None:
    ledger = ledger_of()
    claimed(ledger, [1, 2])
    block = ledger.lease(DECODE, 1)[0]
    with pytest.raises(StaleError, match="only once"):
        ledger.commit("h1", 1, DECODE, first_index=1, blocks=[block, block], keys=[b"a", b"b"])
    for foreign in (7, -1, 8, 10**9):
        with pytest.raises(StaleError, match="is not the sender's"):
            ledger.commit("h1", 1, DECODE, first_index=1, blocks=[foreign], keys=[b"a"])


# ---- handing over --------------------------------------------------------------------------------


def test_nobody_may_write_a_sealed_handoff() -> None:
    ledger = ledger_of()
    handoff = sealed(ledger, [1, 2, 3])
    assert (handoff.state, handoff.writer) == (HandoffState.SEALED, "")
    for member in (PREFILL, DECODE):
        with pytest.raises(StaleError, match="not the writer"):
            handoff.check_writer(ledger.pool, member, handoff.blocks[1:])


def test_a_seal_said_twice_is_taken_once() -> None:
    ledger = ledger_of()
    sealed(ledger, [1, 2, 3])
    handoff = ledger.seal("h1", 1, PREFILL, finished=True)
    assert handoff.state is HandoffState.SEALED


def test_a_finished_handoff_leaves_cache_and_nothing_else() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    commit(ledger, handoff)
    ledger.seal("h1", 1, PREFILL, finished=True)
    assert ledger.handoffs == {}
    assert counts(ledger) == {"cached": 1, "free": 7}


def test_only_prefill_may_seal_and_only_decode_may_claim() -> None:
    ledger = ledger_of()
    filling(ledger, [1, 2, 3])
    with pytest.raises(StaleError, match="not the writer"):
        ledger.seal("h1", 1, DECODE, finished=False)
    ledger.seal("h1", 1, PREFILL, finished=False)
    with pytest.raises(StaleError, match="not the decode worker"):
        ledger.claim("h1", 1, PREFILL)


def test_the_unfinished_block_joins_the_lease_of_decode() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    assert (handoff.state, handoff.writer) == (HandoffState.CLAIMED, DECODE)
    assert ledger.pool.is_granted(handoff.blocks[1], DECODE)
    assert ledger.claim("h1", 1, DECODE) is handoff


def test_a_block_that_changes_hands_gets_another_stamp_and_a_final_one_keeps_its() -> None:
    ledger = ledger_of()
    handoff = sealed(ledger, [1, 2, 3])
    before = [ledger.pool[block].stamp for block in handoff.blocks]
    ledger.claim("h1", 1, DECODE)
    ledger.claim("h1", 1, DECODE)
    assert [ledger.pool[block].stamp for block in handoff.blocks] == [before[0], before[1] + 1]


def test_what_prefill_filled_survives_its_end_once_it_has_sealed() -> None:
    ledger = ledger_of()
    handoff = sealed(ledger, [1, 2, 3])
    assert handoff not in ledger.handoffs_of(PREFILL)
    ledger.lose_writer(PREFILL)
    ledger.member_stopped(PREFILL)
    assert counts(ledger) == {"free": 6, "committed": 1, "granted": 1}
    ledger.claim("h1", 1, DECODE)
    assert ledger.pool.is_granted(handoff.blocks[1], DECODE)


def test_a_released_handoff_leaves_its_unfinished_block_in_the_lease() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    rest = handoff.blocks[1]
    ledger.release("h1", 1, DECODE)
    assert counts(ledger) == {"free": 6, "cached": 1, "granted": 1}
    assert ledger.pool.is_granted(rest, DECODE)


def test_only_decode_may_release() -> None:
    ledger = ledger_of()
    claimed(ledger, [1, 2, 3])
    with pytest.raises(StaleError, match="not the writer"):
        ledger.release("h1", 1, PREFILL)


# ---- reading and writing bytes -------------------------------------------------------------------


def test_decode_may_read_what_is_final_and_all_of_it_once_claimed() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    commit(ledger, handoff)
    assert handoff.readable(DECODE, [0]) == handoff.blocks[:1]
    assert handoff.readable(DECODE, []) == []
    for indexes in ([1], [0, 1], [5]):
        with pytest.raises(StaleError, match="does not hold"):
            handoff.readable(DECODE, indexes)
    ledger.seal("h1", 1, PREFILL, finished=False)
    ledger.claim("h1", 1, DECODE)
    assert handoff.readable(DECODE, [1, 0]) == handoff.blocks[::-1]
    assert handoff.readable(PREFILL, [0]) == handoff.blocks[:1]
    for member, indexes, reason in (
        (PREFILL, [1], "does not hold"),
        (DECODE, [2], "does not hold"),
        ("another", [0], "not a worker"),
    ):
        with pytest.raises(StaleError, match=reason):
            handoff.readable(member, indexes)


def test_bytes_of_a_handoff_that_is_over_are_not_to_be_had() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    assert ledger.find("h1", 1) is handoff
    ledger.abort("h1", is_fenced=False)
    with pytest.raises(StaleError, match="over"):
        ledger.find("h1", 1)


def test_a_digest_is_bound_to_the_key_of_its_block_or_else_of_its_parent() -> None:
    ledger = ledger_of()
    keys = prompt_keys(ROOT, [1, 2, 3, 4], 2)
    handoff = opened(ledger, [1, 2, 3, 4, 5])
    assert [handoff.key_of(index) for index in range(3)] == [*keys, keys[-1]]
    assert opened(ledger, [1]).key_of(0) == ROOT


def test_a_writer_may_write_what_is_not_final_yet() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    commit(ledger, handoff)
    handoff.check_writer(ledger.pool, PREFILL, handoff.blocks[1:])
    for blocks in (handoff.blocks, [7], [-1], [99]):
        with pytest.raises(StaleError, match="is not the sender's"):
            handoff.check_writer(ledger.pool, PREFILL, blocks)
