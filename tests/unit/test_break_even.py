"""When a prompt's KV is worth moving, by value and for whatever rates there are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.step_times import StepTimes
from services.gateway.routing.break_even import Move, expected_move
from services.gateway.routing.candidates import Candidate, Wanted
from services.gateway.routing.placement import Choice, choose

PROMPTS = StepTimes(base_ms=10, token_ms=1, max_tokens=100)  # 1,000 tokens: 1.1 s
TOKENS = StepTimes(base_ms=20, token_ms=1)
WANTED = Wanted(1000, token_bytes=1000)  # 1 MB
LOCAL_S = 1.1


def worker(name: str, rate: float = 0.0, **fields: Any) -> Candidate:
    defaults: dict[str, Any] = {
        "num_sequences": 0,
        "max_num_seqs": 8,
        "prompt_steps": PROMPTS,
        "token_steps": TOKENS,
        "moves": True,
        "bytes_per_s": rate,
        "pushed_bytes_per_s": rate,
    }
    return Candidate(name, **defaults | fields)


def chosen(
    prefill: Candidate, decode: Candidate, max_local_tokens: int = 32, wanted: Wanted = WANTED
) -> Choice[Candidate]:
    return choose(wanted, [prefill], [decode], 0.0, max_local_tokens=max_local_tokens)


def test_blocks_go_through_the_store_while_others_are_computed() -> None:
    move = expected_move(
        worker("p", 1e6), worker("d", 1e6), WANTED, compute_s=2.0, num_chunks=10, local_s=LOCAL_S
    )
    assert (move.num_bytes, move.bytes_per_s) == (1_000_000, 1e6)
    assert move.transfer_s == pytest.approx(1.1)  # a tenth of it is nowhere else meanwhile
    assert move.residue_s == pytest.approx(0.2)  # the last tenth, by both ways
    slow = expected_move(
        worker("p", 1e6), worker("d", 2.5e5), WANTED, compute_s=2.0, num_chunks=10, local_s=LOCAL_S
    )
    assert (slow.num_bytes, slow.bytes_per_s) == (1_000_000, 2.5e5)
    assert slow.residue_s == pytest.approx(0.2 + 0.1 + 4.0 - 2.0)


def test_what_is_there_or_in_memory_that_both_see_is_not_moved() -> None:
    shared = {"moves": False}
    assert expected_move(
        worker("p", **shared),
        worker("d", **shared),
        WANTED,
        compute_s=1.0,
        num_chunks=1,
        local_s=LOCAL_S,
    ) == Move(local_s=LOCAL_S)
    cached = Wanted(1000, num_cached=400, token_bytes=1000)
    to_store = expected_move(
        worker("p", 1e6),
        worker("d", **shared),
        cached,
        compute_s=1.0,
        num_chunks=1,
        local_s=LOCAL_S,
    )
    assert to_store.num_bytes == 600_000
    assert to_store.residue_s == pytest.approx(0.6)
    from_store = expected_move(
        worker("p", **shared),
        worker("d", 1e6, num_held=300),
        cached,
        compute_s=1.0,
        num_chunks=1,
        local_s=LOCAL_S,
    )
    assert from_store.num_bytes == 700_000
    assert from_store.residue_s == pytest.approx(0.7)


@pytest.mark.parametrize(("rate", "is_local"), [(1e8, False), (2e6, False), (5e5, True)])
def test_a_long_prompt_stays_with_decode_when_its_kv_takes_longer_than_computing_it(
    rate: float, is_local: bool
) -> None:
    choice = chosen(worker("p", rate), worker("d", rate))
    assert choice.decision.is_prefilled_by_decode == is_local
    even = choice.decision.chosen.break_even
    assert even is not None
    assert even.local_ms == pytest.approx(1100)
    assert even.transfer_ms == pytest.approx(1.1e9 / rate)
    assert even.pays != is_local
    assert (
        f"to move 1,000,000 bytes at {rate:,.0f} a second" in choice.decision.reason
    ) == is_local


def test_decode_computes_no_prompts_where_it_is_not_to() -> None:
    assert chosen(worker("p", 1e3), worker("d", 1e3), max_local_tokens=0).prefill.name == "p"


def test_each_pair_is_judged_by_its_own_links() -> None:
    near, far = worker("near", 1e8), worker("far", 1e5)
    busy = {"num_sequences": 4, "num_context_tokens": 4000}
    both = choose(
        WANTED, [worker("p", 1e8)], [worker("near", 1e8, **busy), far], 0.0, max_local_tokens=32
    )
    verdicts = {
        (each.prefill, each.decode): each.break_even.pays
        for each in (both.decision.chosen, *both.decision.alternatives)
        if each.break_even
    }
    assert verdicts == {("p", "near"): True, ("p", "far"): False, ("far", "far"): False}
    assert chosen(worker("p", 1e8), near).prefill.name == "p"
    assert chosen(worker("p", 1e8), far).prefill.name == "far"
    assert chosen(worker("p", 1e5), worker("d", moves=False)).prefill.name == "d"


def test_those_that_run_there_may_lose_no_more_than_the_request_gains() -> None:
    few = worker("d", 5e5, num_sequences=1, num_context_tokens=100)
    assert chosen(worker("p", 5e5), few).prefill.name == "p"  # gains 0.9 s, costs the other 1.1
    very_slow = worker("d", 2e5, num_sequences=1, num_context_tokens=100)
    assert chosen(worker("p", 2e5), very_slow).prefill.name == "d"
    strict = worker("d", 2e5, num_sequences=1, tpot_limit_s=0.025)  # a step alone takes 22 ms
    assert chosen(worker("p", 2e5), strict).prefill.name == "p"
    lax = worker("d", 2e5, num_sequences=1, tpot_limit_s=0.15)
    assert chosen(worker("p", 2e5), lax).prefill.name == "d"


RATES = st.floats(1e3, 1e12)
COUNTS = st.integers(0, 999)


@given(rates=st.tuples(RATES, RATES), compute_s=st.floats(0, 100), counts=st.tuples(*[COUNTS] * 3))
def test_a_residue_is_a_part_of_the_transfer_and_never_less_than_what_cannot_overlap(
    rates: tuple[float, float], compute_s: float, counts: tuple[int, int, int]
) -> None:
    (push, pull), (num_chunks, num_cached, num_held) = rates, counts
    move = expected_move(
        worker("p", push),
        worker("d", pull, num_held=num_held),
        Wanted(1000, num_cached=num_cached, token_bytes=1000),
        compute_s=compute_s,
        num_chunks=num_chunks,
        local_s=LOCAL_S,
    )
    slowest_s = move.num_bytes / move.bytes_per_s
    assert slowest_s <= move.transfer_s * (1 + 1e-9) <= 2 * slowest_s * (1 + 1e-9)
    rounding = 1e-9 * (compute_s + move.transfer_s)
    assert move.residue_s <= move.transfer_s + rounding
    assert move.residue_s >= max(slowest_s - compute_s, 0.0) - rounding
    assert move.residue_s >= move.transfer_s / max(1, num_chunks) / 2 - rounding


@given(slower=st.floats(1, 1e4), faster=st.floats(1, 1e4))
def test_a_faster_link_never_makes_moving_worse(slower: float, faster: float) -> None:
    slower, faster = sorted((slower * 1e4, faster * 1e4))
    moves = [
        expected_move(
            worker("p", r), worker("d", r), WANTED, compute_s=1.0, num_chunks=4, local_s=LOCAL_S
        )
        for r in (slower, faster)
    ]
    assert moves[0].transfer_s >= moves[1].transfer_s
    assert moves[0].pays <= moves[1].pays
