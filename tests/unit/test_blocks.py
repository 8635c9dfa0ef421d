"""The block pool by value: states, order of eviction, the index; and that the counts add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kv.hashing import prompt_keys
from services.kvstore.blocks import BlockName, BlockPool, BlockState

ROOT, TENANT = b"root", b"tenant"


def name(key: bytes, parent: bytes = ROOT) -> BlockName:
    return BlockName(key, parent, TENANT)


def committed(pool: BlockPool, keys: list[bytes], after: bytes = ROOT) -> list[int]:
    """New blocks with these keys, each the parent of the next, and one reader each."""
    blocks = pool.grant(len(keys), "writer")
    for block, key, parent in zip(blocks, keys, [after, *keys], strict=False):
        pool.commit(block, name(key, parent))
    return blocks


def cached(pool: BlockPool, keys: list[bytes]) -> list[int]:
    blocks = committed(pool, keys)
    pool.unpin(blocks)
    return blocks


def present(pool: BlockPool, keys: list[bytes]) -> list[bytes]:
    return [key for key in keys if pool.lookup([key])]


def counts(pool: BlockPool) -> dict[str, int]:
    pool.check()
    return {state: count for state, count in pool.counts().items() if count}


def test_a_new_pool_is_free() -> None:
    pool = BlockPool(3)
    assert counts(pool) == {"free": 3}
    assert pool.num_available == 3


def test_a_grant_gives_the_blocks_that_are_free_for_longest() -> None:
    pool = BlockPool(3)
    assert pool.grant(2, "a") == [0, 1]
    pool.free([1, 0])
    assert pool.grant(3, "a") == [2, 1, 0]


def test_only_the_writer_is_granted_a_block() -> None:
    pool = BlockPool(2)
    pool.grant(1, "a")
    assert pool.is_granted(0, "a")
    assert not pool.is_granted(0, "b")
    assert not pool.is_granted(1, "a")


@pytest.mark.parametrize("block_id", [-1, 2, 10**12])
def test_a_block_that_is_not_there_is_granted_to_nobody(block_id: int) -> None:
    pool = BlockPool(2)
    pool.grant(2, "")
    assert not pool.is_granted(block_id, "")


def test_a_block_handed_on_has_a_new_writer() -> None:
    pool = BlockPool(1)
    pool.grant(1, "a")
    pool.hand_on(0, "b")
    assert pool.written_by("a") == []
    assert pool.written_by("b") == [0]


def test_a_quarantined_block_is_its_writers_until_it_is_freed() -> None:
    pool = BlockPool(2)
    pool.grant(1, "a")
    pool.quarantine([0])
    assert counts(pool) == {"free": 1, "quarantined": 1}
    assert not pool.is_granted(0, "a")
    assert pool.written_by("a") == [0]
    assert pool.num_available == 1
    pool.free([0])
    assert counts(pool) == {"free": 2}


def test_a_committed_block_answers_for_its_key() -> None:
    pool = BlockPool(2)
    blocks = committed(pool, [b"k"])
    assert pool.lookup([b"k"]) == blocks
    assert pool.written_by("writer") == []
    assert counts(pool) == {"free": 1, "committed": 1}


def test_a_lookup_ends_at_the_first_key_that_is_not_there() -> None:
    pool = BlockPool(4)
    blocks = committed(pool, [b"1", b"2", b"4"])
    assert pool.lookup([b"1", b"2", b"3", b"4"]) == blocks[:2]
    assert pool.lookup([b"3", b"4"]) == []


def test_a_block_without_readers_becomes_cache_and_keeps_its_key() -> None:
    pool = BlockPool(2)
    blocks = committed(pool, [b"k"])
    pool.pin(blocks)
    pool.unpin(blocks)
    assert counts(pool)["committed"] == 1
    pool.unpin(blocks)
    assert counts(pool)["cached"] == 1
    assert pool.lookup([b"k"]) == blocks
    assert pool.num_available == 2


def test_cache_that_is_read_again_cannot_be_evicted() -> None:
    pool = BlockPool(2)
    blocks = cached(pool, [b"k"])
    assert pool.num_cached(blocks) == 1
    pool.pin(blocks)
    assert pool.num_cached(blocks) == 0
    assert pool.num_available == 1
    pool.grant(1, "a")
    assert pool.lookup([b"k"]) == blocks


def test_free_blocks_go_before_cache() -> None:
    pool = BlockPool(2)
    cached(pool, [b"k"])
    pool.grant(1, "a")
    assert present(pool, [b"k"]) == [b"k"]
    pool.grant(1, "a")
    assert present(pool, [b"k"]) == []


def test_leaves_are_evicted_before_their_parents() -> None:
    pool = BlockPool(3)
    cached(pool, [b"1", b"2", b"3"])
    left = []
    for _ in range(3):
        pool.grant(1, "a")
        left.append(present(pool, [b"1", b"2", b"3"]))
    assert left == [[b"1", b"2"], [b"1"], []]


def test_a_parent_is_evicted_after_its_children_however_long_it_has_not_been_read() -> None:
    pool = BlockPool(2)
    parent, child = committed(pool, [b"1", b"2"])
    pool.unpin([parent])
    pool.unpin([child])
    assert pool.grant(1, "a") == [child]
    assert present(pool, [b"1", b"2"]) == [b"1"]


def test_a_parent_whose_children_are_all_read_by_others_is_evicted_all_the_same() -> None:
    """They read it in a block of their own, which does not answer for its key."""
    pool = BlockPool(3)
    [found] = cached(pool, [b"1"])
    duplicate, child = committed(pool, [b"1", b"2"])
    assert pool[duplicate].name is None
    assert pool.grant(1, "a") == [found]
    assert present(pool, [b"1", b"2"]) == [b"2"]
    pool.unpin([duplicate, child])
    assert counts(pool) == {"cached": 1, "free": 1, "granted": 1}
    [again] = cached(pool, [b"1"])
    assert pool.lookup([b"1", b"2"]) == [again, child]


def test_blocks_given_up_as_cold_are_evicted_first() -> None:
    pool = BlockPool(3)
    first, second = cached(pool, [b"a"]), cached(pool, [b"b"])
    pool.pin(second)
    pool.unpin(second, cold=True)
    assert pool.coldest(2) == [*second, *first]
    pool.grant(2, "a")
    assert present(pool, [b"a", b"b"]) == [b"a"]


# ---- stamps --------------------------------------------------------------------------------------


def test_each_grant_of_a_block_gives_it_a_stamp_it_never_had() -> None:
    pool = BlockPool(1)
    stamps = []
    for key in (b"k", None, b"k", b"k"):  # the last evicts
        [block] = pool.grant(1, "a")
        stamps.append(pool[block].stamp)
        if key is None:
            pool.free([block])
            continue
        pool.commit(block, name(key))
        pool.unpin([block])
        pool.pin([block])
        pool.unpin([block])
        assert pool[block].stamp == stamps[-1]
    assert stamps == [1, 2, 3, 4]


def test_a_block_handed_on_has_a_stamp_it_never_had() -> None:
    pool = BlockPool(1)
    pool.grant(1, "a")
    pool.hand_on(0, "b")
    assert pool[0].stamp == 2
    pool.quarantine([0])
    pool.free([0])
    pool.grant(1, "a")
    assert pool[0].stamp == 3


# ---- what turned out to be wrong -----------------------------------------------------------------


def test_a_cached_block_that_is_discarded_is_free() -> None:
    pool = BlockPool(2)
    [block] = cached(pool, [b"k"])
    assert pool.discard(block)
    assert pool.lookup([b"k"]) == []
    assert counts(pool) == {"free": 2}
    assert pool.coldest(2) == []


def test_a_block_discarded_while_it_is_read_is_found_no_more_and_freed_with_its_readers() -> None:
    pool = BlockPool(2)
    [block] = committed(pool, [b"k"])
    assert pool.discard(block)
    assert not pool.discard(block)
    assert pool.lookup([b"k"]) == []
    assert counts(pool) == {"free": 1, "committed": 1}
    pool.unpin([block])
    assert counts(pool) == {"free": 2}


def test_the_children_of_a_discarded_block_are_found_again_once_it_is_computed_anew() -> None:
    pool = BlockPool(3)
    parent, child = cached(pool, [b"1", b"2"])
    pool.discard(parent)
    assert pool.lookup([b"1", b"2"]) == []
    assert counts(pool) == {"free": 2, "cached": 1}
    [parent] = cached(pool, [b"1"])
    assert pool.lookup([b"1", b"2"]) == [parent, child]


def test_the_least_recently_read_chain_is_evicted_first() -> None:
    pool = BlockPool(4)
    first, _ = cached(pool, [b"a1", b"a2"]), cached(pool, [b"b1", b"b2"])
    pool.pin(first)
    pool.unpin(first)
    pool.grant(2, "a")
    assert present(pool, [b"a1", b"a2", b"b1", b"b2"]) == [b"a1", b"a2"]


def test_an_evicted_block_forgets_its_key() -> None:
    pool = BlockPool(1)
    cached(pool, [b"old"])
    blocks = pool.grant(1, "a")
    assert pool[blocks[0]].name is None
    pool.commit(blocks[0], name(b"new"))
    assert present(pool, [b"old", b"new"]) == [b"new"]


def test_the_first_block_of_a_key_answers_for_it() -> None:
    pool = BlockPool(2)
    first, second = committed(pool, [b"k"]), committed(pool, [b"k"])
    assert pool.lookup([b"k"]) == first
    pool.unpin(second)
    assert counts(pool) == {"committed": 1, "free": 1}
    assert pool.lookup([b"k"]) == first


def test_the_second_block_of_a_key_never_answers_for_it() -> None:
    pool = BlockPool(2)
    first, second = cached(pool, [b"k"]), committed(pool, [b"k"])
    pool.grant(1, "a")  # evicts the first
    assert pool.lookup([b"k"]) == []
    pool.unpin(second)
    assert pool[second[0]].state is BlockState.FREE
    assert first != second


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.free([2]),  # free already
        lambda pool: pool.free([0, 0]),
        lambda pool: pool.free([1]),  # committed
        lambda pool: pool.commit(1, name(b"k")),
        lambda pool: pool.quarantine([1]),
        lambda pool: pool.hand_on(1, "b"),
        lambda pool: pool.pin([0]),  # not final
        lambda pool: pool.unpin([1, 1]),  # one reader only
        lambda pool: pool.grant(2, "b"),  # one is left
        lambda pool: pool.grant(-1, "b"),
        lambda pool: pool.commit(0, None) or pool.free([0]),
        lambda pool: pool.discard(0),
    ],
)
def test_what_the_ledger_must_never_do_is_seen(misuse) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(3)
    pool.grant(2, "a")
    pool.commit(1, name(b"k"))
    with pytest.raises(AssertionError):
        misuse(pool)


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


@given(st.lists(st.tuples(TOKENS, st.integers(0, 3)), max_size=25), st.integers(5, 9))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_is_read_no_block_outlives_its_parent_in_the_index(
    requests: list[tuple[list[int], int]], num_blocks: int
) -> None:
    """Each request reads what is there, computes the rest at once, and ends some requests later."""
    pool = BlockPool(num_blocks)
    reading: list[tuple[int, list[int]]] = []
    keys_seen: dict[bytes, bytes] = {}
    for now, (tokens, duration) in enumerate(requests):
        for ends_at, blocks in list(reading):
            if ends_at <= now:
                pool.unpin(blocks)
                reading.remove((ends_at, blocks))
        keys = prompt_keys(ROOT, tokens, 1)
        keys_seen.update(zip(keys, [ROOT, *keys], strict=False))
        blocks = pool.lookup(keys)
        pool.pin(blocks)
        if len(keys) - len(blocks) > pool.num_available:
            pool.unpin(blocks)
            continue
        after = keys[len(blocks) - 1] if blocks else ROOT
        blocks = blocks + committed(pool, keys[len(blocks) :], after)
        reading.append((now + duration, blocks))
        assert pool.lookup(keys) == blocks
        pool.check()
        for key, parent in keys_seen.items():
            assert not pool.lookup([key]) or parent == ROOT or pool.lookup([parent])
