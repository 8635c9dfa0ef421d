"""The ledger by value: how handoffs and members end, and what comes too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.messages import StaleError
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from tests.unit.ledgers import (
    DECODE,
    GATEWAY,
    PREFILL,
    claimed,
    commit,
    counts,
    filling,
    filling_with_one_committed,
    ledger_of,
    opened,
    sealed,
    waiting,
)

# ---- endings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [opened, sealed])
def test_an_abort_frees_at_once_what_nobody_writes(
    reach: Callable[[Ledger, list[int]], Handoff],
) -> None:
    ledger = ledger_of()
    handoff = reach(ledger, [1, 2, 3])
    assert ledger.abort("h1", is_fenced=False) is handoff
    assert ledger.handoffs == {}
    assert ledger.num_reserved == 0
    assert "granted" not in counts(ledger)


def test_an_abort_takes_a_waiting_handoff_out_of_the_line() -> None:
    ledger = ledger_of()
    waiting(ledger, [1])
    ledger.abort("h1", is_fenced=False)
    assert ledger.num_waiting == 0
    assert ledger.admit() == []


def test_blocks_that_prefill_may_still_write_are_quarantined() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3, 4, 5])
    commit(ledger, handoff)
    ledger.abort("h1", is_fenced=False)
    assert handoff.state is HandoffState.ABORTING
    assert counts(ledger) == {"free": 5, "committed": 1, "quarantined": 2}
    with pytest.raises(StaleError, match="over"):
        commit(ledger, handoff)


def test_a_quit_frees_what_an_abort_quarantined() -> None:
    ledger = ledger_of()
    filling(ledger, [1, 2, 3])
    ledger.quit("h1", PREFILL)  # too early: nothing is aborted
    assert counts(ledger)["granted"] == 2
    ledger.abort("h1", is_fenced=False)
    ledger.quit("h1", DECODE)  # not the writer
    assert counts(ledger)["quarantined"] == 2
    ledger.quit("h1", PREFILL)
    ledger.quit("h1", PREFILL)
    assert ledger.handoffs == {}
    assert counts(ledger) == {"free": 8}


def test_an_abort_is_taken_once() -> None:
    ledger = ledger_of()
    filling(ledger, [1])
    assert ledger.abort("h1", is_fenced=False) is not None
    for is_fenced in (False, True):
        assert ledger.abort("h1", is_fenced=is_fenced) is None
        assert ledger.abort("h2", is_fenced=is_fenced) is None


@pytest.mark.parametrize("reach", [filling_with_one_committed, claimed])
def test_what_an_aborted_handoff_reads_stays_pinned_until_its_gateway_takes_no_more(
    reach: Callable[[Ledger, list[int]], Handoff],
) -> None:
    ledger = ledger_of()
    handoff = reach(ledger, [1, 2, 3])
    block = handoff.blocks[0]
    ledger.abort("h1", is_fenced=False)
    assert ledger.pool[block].num_readers == 1
    assert counts(ledger)["committed"] == 1
    for _ in range(2):
        ledger.abort("h1", is_fenced=True)
        assert counts(ledger)["cached"] == 1
        assert handoff.state is HandoffState.ABORTING


@pytest.mark.parametrize("reach", [filling_with_one_committed, claimed])
def test_an_abort_by_the_gateway_itself_lets_go_at_once_of_what_is_read(
    reach: Callable[[Ledger, list[int]], Handoff],
) -> None:
    ledger = ledger_of()
    reach(ledger, [1, 2, 3])
    assert ledger.abort("h1", is_fenced=True) is not None
    assert counts(ledger)["cached"] == 1
    assert list(ledger.handoffs) == ["h1"]


@pytest.mark.parametrize("reach", [filling_with_one_committed, claimed])
def test_a_gateway_that_has_stopped_takes_no_more(
    reach: Callable[[Ledger, list[int]], Handoff],
) -> None:
    ledger = ledger_of()
    handoff = reach(ledger, [1, 2, 3])
    for member in (GATEWAY, handoff.writer):
        assert ledger.waits_for(member)
    ledger.abort("h1", is_fenced=False)
    ledger.member_stopped("another")
    assert counts(ledger)["committed"] == 1
    assert ledger.waits_for(GATEWAY)
    ledger.member_stopped(GATEWAY)
    assert counts(ledger)["cached"] == 1
    assert list(ledger.handoffs) == ["h1"]  # its writer has not quit
    ledger.quit("h1", handoff.writer)
    assert ledger.handoffs == {}
    assert not ledger.waits_for(GATEWAY)


@pytest.mark.parametrize("end", [Ledger.quit, lambda ledger, _id, who: ledger.member_stopped(who)])
@pytest.mark.parametrize("reach", [filling_with_one_committed, claimed])
def test_a_reader_that_has_quit_or_stopped_needs_no_fence(
    reach: Callable[[Ledger, list[int]], Handoff], end: Callable[[Ledger, str, str], None]
) -> None:
    ledger = ledger_of()
    writer = reach(ledger, [1, 2, 3]).writer
    ledger.abort("h1", is_fenced=False)
    end(ledger, "h1", writer)
    assert ledger.handoffs == {}
    assert counts(ledger)["cached"] == 1


# ---- commits that come too late ------------------------------------------------------------------


@pytest.mark.parametrize("is_fenced", [False, True])
def test_what_decode_commits_after_an_abort_leaves_its_lease_and_is_never_found(
    is_fenced: bool,
) -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    rest = handoff.blocks[1:]
    ledger.abort("h1", is_fenced=is_fenced)
    ledger.commit("h1", 1, DECODE, first_index=1, blocks=rest, keys=[b"k1"])
    assert ledger.pool.find(b"k1") is None
    assert not ledger.pool.is_granted(rest[0], DECODE)
    assert counts(ledger) == (
        {"free": 7, "cached": 1} if is_fenced else {"free": 6, "committed": 2}
    )
    with pytest.raises(StaleError, match="is not the sender's to write"):
        ledger.commit("h1", 1, DECODE, first_index=1, blocks=rest, keys=[b"k1"])
    ledger.quit("h1", DECODE)
    assert counts(ledger) == {"free": 7, "cached": 1}


def test_commits_after_an_abort_keep_what_came_before_pinned_until_the_fence() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    blocks = handoff.blocks[1:] + ledger.lease(DECODE, 1)
    ledger.abort("h1", is_fenced=False)
    for index, block in enumerate(blocks, 1):
        ledger.commit("h1", 1, DECODE, first_index=index, blocks=[block], keys=[b"k"])
    assert counts(ledger) == {"free": 5, "committed": 3}
    ledger.abort("h1", is_fenced=True)
    assert counts(ledger) == {"free": 7, "cached": 1}


def test_nobody_commits_after_an_abort_what_is_not_his() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    free = 7
    ledger.abort("h1", is_fenced=False)
    [block] = handoff.blocks[1:]
    for member, epoch, blocks, reason in (
        (PREFILL, 1, [block], "over"),
        (DECODE, 2, [block], "over"),
        (DECODE, 1, [free], "is not the sender's to write"),
        (DECODE, 1, [block, block], "only once"),
    ):
        with pytest.raises(StaleError, match=reason):
            ledger.commit("h1", epoch, member, first_index=1, blocks=blocks, keys=[b"k"])
    assert counts(ledger) == {"free": 6, "committed": 1, "granted": 1}


def test_decode_cannot_commit_what_prefill_was_filling_when_it_was_aborted() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    ledger.abort("h1", is_fenced=False)
    with pytest.raises(StaleError, match="not the writer"):
        ledger.commit("h1", 1, DECODE, first_index=0, blocks=handoff.blocks[:1], keys=[])
    assert counts(ledger) == {"free": 6, "quarantined": 2}


# ---- blocks that are not what they should be -----------------------------------------------------


def test_a_block_whose_reader_finds_it_corrupt_is_found_no_more() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3, 4, 5])
    assert ledger.discard("h1", 1, DECODE, [0, 2]) == 1  # the last one is not final
    assert ledger.discard("h1", 1, DECODE, [0]) == 0
    assert ledger.pool.lookup(handoff.keys) == []
    assert counts(ledger) == {"free": 5, "committed": 2, "granted": 1}
    ledger.abort("h1", is_fenced=True)
    ledger.quit("h1", DECODE)
    assert counts(ledger) == {"free": 6, "cached": 1, "granted": 1}


def test_only_who_may_read_a_block_can_have_it_dropped() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2, 3])
    commit(ledger, handoff)
    for member, epoch, indexes in (("another", 1, [0]), (DECODE, 2, [0]), (DECODE, 1, [1])):
        with pytest.raises(StaleError):
            ledger.discard("h1", epoch, member, indexes)
    assert ledger.pool.lookup(handoff.keys) == handoff.blocks[:1]


# ---- those who are gone --------------------------------------------------------------------------


def test_a_silent_decode_worker_has_its_blocks_quarantined_until_it_stops() -> None:
    ledger = ledger_of()
    claimed(ledger, [1, 2, 3])
    ledger.lease(DECODE, 2)
    ledger.abort("h1", is_fenced=False)
    ledger.lose_writer(DECODE)
    assert counts(ledger) == {"free": 4, "committed": 1, "quarantined": 3}
    ledger.member_stopped(DECODE)
    assert ledger.handoffs == {}
    assert counts(ledger) == {"free": 7, "cached": 1}


def test_a_prefill_worker_that_stopped_ends_its_aborted_handoffs() -> None:
    ledger = ledger_of()
    filling(ledger, [1, 2, 3])
    ledger.abort("h1", is_fenced=False)
    ledger.member_stopped(PREFILL)
    assert ledger.handoffs == {}
    assert counts(ledger) == {"free": 8}


def test_each_member_is_needed_as_long_as_it_has_a_part() -> None:
    ledger = ledger_of()
    handoff = filling(ledger, [1, 2])
    for member in (GATEWAY, PREFILL, DECODE):
        assert ledger.handoffs_of(member) == [handoff]
    assert ledger.handoffs_of("another") == []
    commit(ledger, handoff)
    ledger.seal("h1", 1, PREFILL, finished=False)
    assert ledger.handoffs_of(PREFILL) == []
    assert ledger.handoffs_of(DECODE) == [handoff]
