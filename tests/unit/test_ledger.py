"""The ledger by value: room, prefixes, leases. Endings: test_ledger_endings; under any
messages: test_ledger_properties."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.messages import StaleError
from kvbaton.errors import (
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
    UnprocessableError,
)
from services.kvstore.handoff import HandoffState
from tests.unit.ledgers import (
    DECODE,
    PREFILL,
    cached,
    claimed,
    commit,
    counts,
    filling,
    ledger_of,
    opened,
    request_of,
    waiting,
)

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
