"""The ledger by value: room, leases and endings. Under any messages: test_ledger_properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.messages import StaleError
from kvbaton.errors import (
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
    UnprocessableError,
)
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from tests.unit.ledgers import (
    DECODE,
    GATEWAY,
    PREFILL,
    cached,
    claimed,
    commit,
    counts,
    filling,
    ledger_of,
    opened,
    request_of,
    sealed,
    waiting,
)


def filling_with_one_committed(ledger: Ledger, tokens: list[int]) -> Handoff:
    handoff = filling(ledger, tokens)
    commit(ledger, handoff)
    return handoff


# ---- opening -------------------------------------------------------------------------------------


def test_an_open_handoff_waits_until_it_is_admitted() -> None:
    ledger = ledger_of()
    handoff = waiting(ledger, [1, 2, 3])
    assert (handoff.state, handoff.epoch, ledger.num_waiting) == (HandoffState.WAITING, 1, 1)
    assert ledger.admit() == [handoff]
    assert (handoff.state, handoff.num_reserved, ledger.num_waiting) == (
        HandoffState.RESERVED,
        2,
        0,
    )
    assert counts(ledger) == {"free": 8}


@pytest.mark.parametrize("ends", [False, True])
def test_a_new_handoff_stands_in_the_line_once_it_is_prepared(ends: bool) -> None:
    ledger = ledger_of()
    first = ledger.open(request_of([1, 2, 3]))
    second = waiting(ledger, [4])
    assert (first.state, ledger.num_waiting) == (HandoffState.WAITING, 2)
    assert ledger.admit() == [second]
    if ends:
        assert ledger.abort("h1", is_fenced=False) is first
        assert list(ledger.handoffs) == ["h2"]
    for _ in range(2):
        ledger.line_up("h1")
        assert ledger.num_waiting == (0 if ends else 1)
    assert ledger.admit() == ([] if ends else [first])
    assert ledger.num_waiting == 0


def test_a_prompt_that_leaves_no_block_to_grow_into_is_refused() -> None:
    ledger = ledger_of(4)
    with pytest.raises(InvalidRequestError, match="needs 4 KV blocks, the KV store has 4") as error:
        waiting(ledger, [1] * 7)
    assert error.value.field == "prompt"
    assert waiting(ledger, [1] * 6).num_tokens == 6


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (-4, 0), (-4, 2), (3, 2)])
def test_numbers_of_tokens_and_keys_that_cannot_be_are_refused(
    num_tokens: int, num_keys: int
) -> None:
    ledger = ledger_of()
    with pytest.raises(UnprocessableError, match="num_tokens must be at least 1") as error:
        ledger.open(replace(request_of([1]), keys=[b"k"] * num_keys, num_tokens=num_tokens))
    assert error.value.field == "num_tokens"
    assert ledger.handoffs == {}


def test_more_waiting_handoffs_than_allowed_are_refused() -> None:
    ledger = ledger_of(max_waiting=2)
    for _ in range(2):
        waiting(ledger, [1])
    with pytest.raises(OverloadedError, match="2 requests already wait"):
        waiting(ledger, [1])


def test_the_first_in_line_is_not_passed_by_a_smaller_one() -> None:
    ledger = ledger_of(8)
    opened(ledger, [1] * 8)
    large = waiting(ledger, [2] * 10)
    small = waiting(ledger, [3])
    assert ledger.admit() == []
    ledger.abort(large.handoff_id, is_fenced=False)
    assert ledger.admit() == [small]


def test_growth_blocks_are_kept_back_while_others_run() -> None:
    ledger = ledger_of(8, growth_blocks=3)
    first = opened(ledger, [1] * 8)
    second = opened(ledger, [2] * 4)
    assert second.state is HandoffState.WAITING
    ledger.abort(first.handoff_id, is_fenced=False)
    assert ledger.admit() == [second]


def test_alone_a_handoff_may_take_what_is_kept_back_for_growth() -> None:
    assert opened(ledger_of(8, growth_blocks=7), [1] * 14).state is HandoffState.RESERVED


def test_a_lease_cannot_take_what_is_reserved() -> None:
    ledger = ledger_of(8)
    opened(ledger, [1] * 10)
    assert len(ledger.lease(DECODE, 100)) == 3
    assert ledger.lease(DECODE, 1) == []


# ---- prefixes ------------------------------------------------------------------------------------


def test_a_prompt_gets_the_blocks_of_an_earlier_one_with_the_same_beginning() -> None:
    ledger = ledger_of()
    blocks = cached(ledger, [1, 2, 3, 4, 5])
    handoff = opened(ledger, [1, 2, 3, 4, 6, 6])
    assert handoff.blocks == blocks
    assert (handoff.num_committed, handoff.num_cached, handoff.num_reserved) == (2, 2, 1)
    assert counts(ledger) == {"committed": 2, "free": 6}


def test_the_last_position_is_always_computed() -> None:
    ledger = ledger_of()
    blocks = cached(ledger, [1, 2, 3, 4])
    assert opened(ledger, [1, 2, 3, 4]).blocks == blocks[:1]


def test_two_requests_read_the_same_blocks() -> None:
    ledger = ledger_of()
    blocks = cached(ledger, [1, 2, 3, 4])
    first, second = opened(ledger, [1, 2, 7]), opened(ledger, [1, 2, 8])
    assert first.blocks == second.blocks == blocks[:1]
    assert ledger.pool[blocks[0]].num_readers == 2
    ledger.abort(first.handoff_id, is_fenced=False)
    assert counts(ledger)["committed"] == 1


def test_without_the_prefix_cache_nothing_is_reused() -> None:
    ledger = ledger_of(prefix_cache=False)
    cached(ledger, [1, 2, 3, 4])
    assert opened(ledger, [1, 2, 3, 4]).num_cached == 0


def test_cache_that_a_request_pins_does_not_count_as_room_for_it() -> None:
    ledger = ledger_of(4)
    cached(ledger, [1, 2, 3, 4, 5, 6])
    opened(ledger, [9])
    handoff = opened(ledger, [1, 2, 3, 4, 5, 6])  # two blocks cached, one more: none is left
    assert handoff.state is HandoffState.WAITING
    assert counts(ledger) == {"free": 1, "cached": 3}


# ---- leases --------------------------------------------------------------------------------------


def test_a_lease_gives_up_to_what_was_asked_for() -> None:
    ledger = ledger_of(3)
    assert len(ledger.lease(DECODE, 2)) == 2
    assert len(ledger.lease(DECODE, 2)) == 1
    assert ledger.lease(DECODE, -1) == []


def test_a_lease_evicts_cache() -> None:
    ledger = ledger_of(4)
    cached(ledger, [1, 2, 3, 4, 5, 6])
    assert len(ledger.lease(DECODE, 4)) == 4
    assert counts(ledger) == {"granted": 4}


def test_leased_blocks_given_back_are_free() -> None:
    ledger = ledger_of(4)
    leased = ledger.lease(DECODE, 3)
    ledger.give_back(DECODE, [leased[0], leased[0], leased[1]])
    assert counts(ledger) == {"free": 3, "granted": 1}


def test_blocks_of_others_cannot_be_given_back() -> None:
    ledger = ledger_of()
    leased = ledger.lease(DECODE, 1)
    handoff = filling(ledger, [1, 2, 3])
    commit(ledger, handoff)
    for member in (PREFILL, "another"):
        ledger.give_back(member, [*leased, *handoff.blocks, -1, 7, 99])
    assert counts(ledger) == {"free": 5, "committed": 1, "granted": 2}


# ---- suspending ----------------------------------------------------------------------------------


def test_a_suspended_handoff_waits_first_in_line_in_a_new_epoch() -> None:
    ledger = ledger_of(6)
    handoff = claimed(ledger, [1, 2, 3])
    opened(ledger, [9] * 8)
    ledger.suspend("h1", 1, DECODE, 4)
    assert (handoff.state, handoff.epoch, handoff.num_tokens) == (HandoffState.WAITING, 2, 4)
    assert counts(ledger) == {"free": 4, "cached": 1, "granted": 1}
    assert ledger.admit() == [handoff]
    assert handoff.num_cached == 1


def test_a_suspended_handoff_goes_on_in_decode_from_what_is_cached() -> None:
    ledger = ledger_of()
    handoff = claimed(ledger, [1, 2, 3])
    ledger.commit("h1", 1, DECODE, first_index=1, blocks=handoff.blocks[1:], keys=[b"k1"])
    before = list(handoff.blocks)
    ledger.suspend("h1", 1, DECODE, 5)
    ledger.admit()
    with pytest.raises(StaleError, match="epoch 2"):
        ledger.fill("h1", 1, DECODE)
    ledger.fill("h1", 2, DECODE)
    assert handoff.blocks[:2] == before
    assert (handoff.num_committed, len(handoff.blocks)) == (2, 3)


def test_a_sequence_larger_than_the_store_cannot_go_on() -> None:
    ledger = ledger_of(4)
    handoff = claimed(ledger, [1, 2, 3])
    with pytest.raises(TooLargeError, match="grown to 9 tokens, the KV store holds 8"):
        ledger.suspend("h1", 1, DECODE, 9)
    assert (handoff.state, handoff.epoch) == (HandoffState.CLAIMED, 1)
    ledger.suspend("h1", 1, DECODE, 8)


def test_a_sequence_cannot_shrink() -> None:
    ledger = ledger_of()
    claimed(ledger, [1, 2, 3])
    with pytest.raises(UnprocessableError, match="at least 3, got 2"):
        ledger.suspend("h1", 1, DECODE, 2)


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
