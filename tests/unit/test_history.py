"""The history: bounded, in order, and one event for each transition."""

from __future__ import annotations

import pytest

from common.messages import (
    AbortHandoff,
    Claim,
    Commit,
    Discard,
    Fill,
    GiveBack,
    Lease,
    Leased,
    Quit,
    Release,
    Seal,
    StaleError,
    Suspend,
)
from services.kvstore.history import History
from tests.unit.broker_store import DECODE, GATEWAY, PREFILL, Store


def names(store: Store, of: str = "request") -> list[str]:
    return [event.name for event in store.broker.history.of_requests([of])]


def details(store: Store, name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Member, blocks and detail of each event of a name."""
    events = store.broker.history.of_requests(["request"])
    return [(each.member_id, each.blocks, each.detail) for each in events if each.name == name]


def test_blocks_and_requests_are_found_in_order() -> None:
    times = iter([1.0, 2.0, 3.0, 4.0])
    history = History(lambda: next(times))
    history.note("a", "h1", "r", "m", blocks=[3, 4], stamps=[1, 1])
    history.note("b", blocks=[4], stamps=[2], detail="why")
    history.note("c", "h2", "r")
    assert [(each.seq, each.at, each.name) for each in history.of_block(4)] == [
        (1, 1.0, "a"),
        (2, 2.0, "b"),
    ]
    assert [each.name for each in history.of_requests(["r"])] == ["a", "c"]
    assert [each.name for each in history.of_requests(["h2", "other"])] == ["c"]
    history.note("d", "h3", "r#1")
    assert [each.name for each in history.of_requests(["r"])] == ["a", "c", "d"]
    assert [each.name for each in history.of_requests(["r#1"])] == ["d"]
    assert history.of_requests([""]) == history.of_block(5) == []
    assert history.opened_at() == {"h1": 1.0, "": 2.0, "h2": 3.0, "h3": 4.0}


def test_the_oldest_events_make_room() -> None:
    history = History(max_events=3, max_blocks=5)
    for number in range(5):
        history.note(f"e{number}", "h", blocks=[number], stamps=[1])
    assert [each.name for each in history.of_requests(["h"])] == ["e2", "e3", "e4"]
    history.note("large", "h", blocks=range(4), stamps=[1] * 4)
    assert [each.name for each in history.of_requests(["h"])] == ["e4", "large"]
    assert (history.num_noted, history.num_forgotten) == (6, 4)


def test_each_step_of_a_request_is_noted_once() -> None:
    store = Store()
    blocks = store.fill()
    store.worker(PREFILL, Fill(handoff_id="h1", epoch=1))
    for _ in range(2):
        commit = Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:2])
        store.worker(PREFILL, commit)
    for _ in range(2):
        store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9))
    for _ in range(2):
        store.worker(DECODE, Claim(handoff_id="h1", epoch=1))
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    with pytest.raises(StaleError):
        store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    assert names(store) == [
        "handoff_opened",
        "handoff_admitted",
        "handoff_filled",
        "blocks_committed",
        "handoff_sealed",
        "handoff_claimed",
        "handoff_released",
    ]
    assert details(store, "handoff_filled") == [(PREFILL, tuple(blocks), "")]
    assert details(store, "blocks_committed") == [(PREFILL, tuple(blocks[:2]), "")]
    assert details(store, "handoff_released") == [(DECODE, tuple(blocks), "")]


def test_an_abort_tells_who_when_and_why_and_what_is_quarantined() -> None:
    store = Store()
    blocks = store.fill()
    store.gateway(AbortHandoff(handoff_id="h1"))
    store.worker(PREFILL, Quit(handoff_id="h1", epoch=1))
    assert names(store)[3:] == [
        "handoff_aborted",
        "blocks_quarantined",
        "handoff_fenced",
        "handoff_quit",
    ]
    reason = "while filling: its gateway ended it"
    assert details(store, "handoff_aborted") == [(GATEWAY, tuple(blocks), reason)]
    assert details(store, "blocks_quarantined") == [(PREFILL, tuple(blocks), "")]
    assert details(store, "handoff_quit") == [(PREFILL, tuple(blocks), "")]


def test_a_fence_after_the_abort_is_noted_too() -> None:
    store = Store()
    store.claim()
    store.broker.lose(DECODE, "it was silent")
    store.gateway(AbortHandoff(handoff_id="h1"))
    store.gateway(AbortHandoff(handoff_id="h1"))
    assert names(store)[-2:] == ["handoff_aborted", "handoff_fenced"]
    assert details(store, "handoff_aborted")[0][::2] == (DECODE, "while claimed: it was silent")


def test_what_a_lost_member_may_write_is_noted_until_it_has_stopped() -> None:
    store = Store()
    leased = store.worker(DECODE, Lease(num_blocks=3))
    assert isinstance(leased, Leased)
    store.worker(DECODE, GiveBack(blocks=[leased.blocks[0], 7]))
    store.broker.lose(DECODE, "it was silent")
    store.broker.lose_writer(DECODE)
    store.broker.member_stopped(DECODE)
    events = store.broker.history.of_block(leased.blocks[1])
    assert [each.name for each in events] == ["blocks_leased", "blocks_quarantined", "blocks_freed"]
    given = store.broker.history.of_block(leased.blocks[0])
    assert [each.name for each in given] == ["blocks_leased", "blocks_given_back"]
    assert given[1].blocks == (leased.blocks[0],)


def test_an_eviction_is_noted_of_the_content_that_went() -> None:
    store = Store(num_blocks=4)
    store.claim()
    store.worker(DECODE, Release(handoff_id="h1", epoch=1))
    before = {block: store.ledger.pool[block].stamp for block in range(4)}
    leased = store.worker(DECODE, Lease(num_blocks=3))
    assert isinstance(leased, Leased)
    evicted = [
        event
        for block in range(4)
        for event in store.broker.history.of_block(block)
        if event.name == "blocks_evicted"
    ]
    assert len({event.seq for event in evicted}) == 1
    assert [before[block] for block in evicted[0].blocks] == list(evicted[0].stamps)
    assert set(evicted[0].blocks) < set(leased.blocks)
    assert len(evicted[0].blocks) == store.ledger.pool.num_evicted


def test_giving_way_and_corrupt_blocks_are_noted() -> None:
    store = Store()
    blocks = store.claim()
    store.worker(DECODE, Discard(handoff_id="h1", epoch=1, indexes=[1]))
    store.worker(DECODE, Suspend(handoff_id="h1", epoch=1, num_tokens=5))
    assert names(store)[-3:] == ["blocks_discarded", "handoff_suspended", "handoff_admitted"]
    assert details(store, "blocks_discarded") == [(DECODE, (blocks[1],), "")]


def test_a_finished_prompt_is_noted_with_all_its_blocks() -> None:
    store = Store()
    blocks = store.fill()
    store.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9, finished=True))
    sealed = (PREFILL, tuple(blocks), "finished: nothing to decode")
    assert details(store, "handoff_sealed") == [sealed]
