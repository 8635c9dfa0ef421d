"""Placement by value: the least wait, free places, and turns among equals."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.placement import (
    Candidate,
    choose_colocated,
    choose_decode,
    choose_prefill,
)


def worker(name: str, **fields: Any) -> Candidate:
    defaults: dict[str, Any] = {
        "num_sequences": 0,
        "num_tokens_queued": 0,
        "tokens_per_s": 100.0,
        "max_num_seqs": 8,
        "num_placed": 0,
    }
    return Candidate(name, **defaults | fields)


@pytest.mark.parametrize(
    ("queued", "rates", "num_tokens", "chosen"),
    [
        ((500, 0), (100.0, 100.0), 10, "b"),  # the shorter queue
        ((0, 0), (100.0, 200.0), 10, "b"),  # the faster of two idle ones
        ((300, 100), (400.0, 100.0), 100, "a"),  # faster is worth a longer queue
        ((300, 100), (400.0, 100.0), 1, "a"),
        ((500, 100), (400.0, 100.0), 1, "b"),  # but for a short prompt not any queue
        ((500, 100), (400.0, 100.0), 100, "a"),
    ],
)
def test_a_prompt_goes_to_the_prefill_worker_that_is_done_first(
    queued: tuple[int, int], rates: tuple[float, float], num_tokens: int, chosen: str
) -> None:
    workers = [
        worker(name, num_tokens_queued=count, tokens_per_s=rate)
        for name, count, rate in zip("ab", queued, rates, strict=True)
    ]
    assert choose_prefill(workers, num_tokens).name == chosen


def test_a_worker_of_unknown_rate_is_taken_for_an_average_one() -> None:
    known = [worker("slow", tokens_per_s=100.0), worker("fast", tokens_per_s=300.0)]
    new = worker("new", tokens_per_s=0.0)
    assert choose_prefill([*known, new], 600).name == "fast"
    known[1].num_tokens_queued = 601  # 4 s; the new one is thought to take 3
    assert choose_prefill([*known, new], 600).name == "new"


def test_without_any_rate_the_queue_alone_decides() -> None:
    workers = [
        worker("a", tokens_per_s=0.0, num_tokens_queued=5),
        worker("b", tokens_per_s=0.0, num_tokens_queued=4),
    ]
    assert choose_prefill(workers, 10).name == "b"
    assert choose_colocated(workers, 10).name == "b"


@pytest.mark.parametrize(
    "choose",
    [
        lambda workers: choose_prefill(workers, 10),
        choose_decode,
        lambda workers: choose_colocated(workers, 10),
    ],
)
def test_equals_take_turns(choose) -> None:  # type: ignore[no-untyped-def]
    workers = [worker(name) for name in "abc"]
    turns = ""
    for _ in range(7):
        chosen = choose(workers)
        chosen.num_placed += 1
        turns += chosen.name
    assert turns == "abcabca"


def test_decode_goes_where_the_largest_share_of_places_is_free() -> None:
    workers = [
        worker("a", num_sequences=3, max_num_seqs=4),
        worker("b", num_sequences=8, max_num_seqs=16),
        worker("c", num_sequences=2, max_num_seqs=3),
    ]
    assert choose_decode(workers).name == "b"


def test_a_full_decode_worker_is_avoided() -> None:
    workers = [
        worker("full", num_sequences=2, max_num_seqs=2),
        worker("long", num_sequences=70, max_num_seqs=64),  # some wait
        worker("busy", num_sequences=7),
    ]
    assert choose_decode(workers).name == "busy"


def test_if_all_are_full_the_least_crowded_is_taken() -> None:
    workers = [worker("a", num_sequences=16), worker("b", num_sequences=9)]
    assert choose_decode(workers).name == "b"


def test_colocated_work_avoids_full_workers_even_with_empty_queues() -> None:
    workers = [
        worker("full", num_sequences=8),
        worker("open", num_sequences=7, num_tokens_queued=5000),
    ]
    assert choose_colocated(workers, 10).name == "open"


def test_colocated_work_of_equal_wait_goes_where_most_places_are_free() -> None:
    workers = [worker("a", num_sequences=5), worker("b", num_sequences=2)]
    assert choose_colocated(workers, 10).name == "b"
    workers[1].num_tokens_queued = 50
    assert choose_colocated(workers, 10).name == "a"
