"""Every state of small worlds: each block has one writer, none is read after it was free, and all
can become free again.

The largest world has too many states: each step from its beginning has three times as many as the
one before, and one request takes thirty. There all states within some steps are visited, and all
those of worlds with fewer members, faults, requests, or messages on their way at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.net.order import Incoming, Verdict
from services.kvstore.blocks import BlockPool
from services.kvstore.ledger import Ledger
from tests.unit.explorer.moves import Bounds
from tests.unit.explorer.search import Explored, ViolationError, explore

ALONE = Bounds(prompts=(0,), num_prefills=1, num_decodes=1)
PAIR = Bounds(prompts=(0, 0), num_prefills=1, num_decodes=2)
THREE = Bounds(prompts=(0, 0, 1), num_prefills=1, num_decodes=1)
LARGEST = Bounds()

ACTIONS = (
    "ask to open", "open", "cancel", "abort", "abort_open", "hear opened", "hear refused",
    "fill", "hear granted", "begin step", "end step", "commit", "seal", "hear sealed", "claim",
    "release", "ask for a lease", "lease", "hear leased", "give_back", "hear aborted", "quit",
)  # fmt: skip
SHORT_OF_BLOCKS = ("give way", "suspend", "resume after opened", "evict")
FAULTS = (
    "crash", "expire", "lose message", "duplicate", "reorder", "gap", "send heartbeat", "beat",
    "hello", "hear welcome", "stopped", "ignore commit", "ignore aborted", "ignore hello_required",
)  # fmt: skip


def show(explored: Explored) -> None:
    """What a run with -s or -rP tells of it."""
    reach = "all" if explored.is_all else f"all within {explored.num_steps} steps"
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(explored.counts.items()))
    print(  # noqa: T201 - asked for
        f"{explored.bounds}: {explored.num_states} states, {reach}; {explored.num_stores} of the "
        f"store; {explored.num_moves} moves: {counts}"
    )


def visit(bounds: Bounds, *actions: str, least_states: int, is_all: bool = True) -> None:
    explored = explore(bounds)
    show(explored)
    assert explored.is_all == is_all
    assert [kind for kind in actions if not explored.counts[kind]] == []
    assert explored.num_states > least_states


def test_one_request_and_whatever_befalls_its_messages() -> None:
    visit(replace(ALONE, most_faults=1), *ACTIONS, *FAULTS, least_states=10_000)


def test_one_request_and_two_faults_while_few_messages_are_on_their_way() -> None:
    visit(replace(ALONE, most_in_flight=1), *ACTIONS, least_states=30_000)


def test_two_requests_of_one_prompt_that_want_more_blocks_than_there_are() -> None:
    bounds = replace(PAIR, most_faults=0, most_in_flight=2)
    visit(bounds, *ACTIONS, *SHORT_OF_BLOCKS, least_states=15_000)


def test_three_requests_of_two_prompts_that_push_each_other_out_of_the_cache() -> None:
    bounds = replace(THREE, most_faults=0, most_in_flight=1)
    visit(bounds, *ACTIONS, "evict", least_states=10_000)


def test_the_first_steps_of_three_requests_at_two_workers_of_each_role_with_two_faults() -> None:
    visit(replace(LARGEST, most_steps=4), least_states=9_000, is_all=False)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("bounds", "actions", "least_states"),
    [
        (ALONE, (*ACTIONS, *FAULTS), 200_000),
        (
            replace(PAIR, num_decodes=1, most_faults=1, most_in_flight=1),
            (*ACTIONS, "crash", "expire", "stopped"),
            70_000,
        ),
        (
            replace(PAIR, num_decodes=1, most_faults=1, most_in_flight=2),
            (*ACTIONS, *FAULTS),
            400_000,
        ),
        (replace(PAIR, num_prefills=2, most_faults=0), (*ACTIONS, *SHORT_OF_BLOCKS), 100_000),
        (replace(LARGEST, most_faults=0, most_in_flight=1), (*ACTIONS, "evict"), 100_000),
        (
            replace(PAIR, prompts=(0, 1), most_faults=1, most_in_flight=1),
            (*ACTIONS, "evict", "crash", "expire", "stopped"),
            100_000,
        ),
    ],
)
def test_larger_worlds(bounds: Bounds, actions: tuple[str, ...], least_states: int) -> None:
    visit(bounds, *actions, least_states=least_states)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_more_steps_of_three_requests_at_two_workers_of_each_role_with_two_faults() -> None:
    visit(replace(LARGEST, most_steps=8), "commit", least_states=500_000, is_all=False)


# ---- what it would show --------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def frees_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may still be written."""
    monkeypatch.setattr(BlockPool, "quarantine", BlockPool.free)


def forgets_who_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "member_stopped", lambda *_: None)


def takes_messages_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Incoming, "take", lambda *_: Verdict.NEXT)


def never_asks_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it still takes tokens: what was read is free as soon as a handoff is aborted."""
    abort = Ledger.abort
    monkeypatch.setattr(
        Ledger,
        "abort",
        lambda ledger, handoff_id, is_fenced, is_kept=False: abort(
            ledger, handoff_id, is_fenced=True
        ),
    )


@pytest.mark.parametrize("plant", [frees_at_once, forgets_who_stopped, takes_messages_twice])
def test_a_planted_defect_is_shown_with_the_shortest_way_there(
    monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    with pytest.raises(ViolationError) as violation:
        explore(replace(ALONE, most_faults=1))
    _, *way = str(violation.value).splitlines()
    assert way[0].startswith("ask to open")
    assert len(way) < 15


@pytest.mark.long
def test_a_block_that_is_read_after_it_was_free_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    never_asks_the_gateway(monkeypatch)
    with pytest.raises(ViolationError, match="read after free"):
        explore(replace(PAIR, num_decodes=1, most_faults=1, most_in_flight=1))
