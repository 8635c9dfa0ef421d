"""What a gateway knows of cached blocks from what it placed."""

from __future__ import annotations

from services.gateway.routing.prefixes import PrefixIndex

KEYS = [bytes([number]) for number in range(6)]


def test_what_was_computed_is_found_and_held_by_those_who_did() -> None:
    index = PrefixIndex()
    assert index.num_found(KEYS) == 0
    index.add(KEYS[:4], [1, 2])
    index.add(KEYS[:2], [3])
    assert index.num_found(KEYS) == 4
    assert index.num_held(KEYS[:4], [1, 3, 4]) == {1: 4, 3: 2, 4: 0}
    assert index.num_held([], [1]) == {1: 0}


def test_an_open_that_finds_less_or_more_corrects_it() -> None:
    index = PrefixIndex()
    index.add(KEYS, [1])
    index.opened(KEYS, 2)  # the rest was evicted
    assert index.num_found(KEYS) == 2
    assert index.num_held(KEYS[:2], [1]) == {1: 2}
    index.opened(KEYS, 5)  # somebody else computed them
    assert index.num_found(KEYS) == 5
    assert index.num_held(KEYS[:5], [1]) == {1: 2}


def test_copies_go_with_their_worker() -> None:
    index = PrefixIndex()
    index.add(KEYS, [1, 2])
    index.forget_worker(1)
    assert index.num_held(KEYS, [1, 2]) == {1: 0, 2: 6}
    assert index.num_found(KEYS) == 6


def test_it_is_bounded_and_forgets_the_tails_of_what_was_used_least_recently() -> None:
    index = PrefixIndex(max_blocks=8)
    index.add(KEYS, [1])
    index.add([b"x", b"y", b"z"], [1])
    assert len(index) == 8
    assert index.num_found(KEYS) == 5
    index.add(KEYS[:5], [1])
    index.add([b"u", b"v", b"w"], [1])
    assert index.num_found(KEYS) == 5
    assert index.num_found([b"x", b"y", b"z"]) == 0
