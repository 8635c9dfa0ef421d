"""The order of eviction: by value, by properties, and by hit rates of a trace of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.benchmarks.eviction import LruOrder
from scripts.benchmarks.trace import Request, conversation_trace, flooded, hit_rate
from services.kvstore.eviction import EvictionOrder, Order

A, B, C = b"a", b"b", b"c"
# Blocks of 512 tokens, and what an independent replay of the trace found with LRU.
LRU_RATES = {5_859: 0.136, 97_656: 0.364, 200_000: 0.366}


def order_of(blocks: Sequence[int], tenant: bytes = A, num_blocks: int = 100) -> EvictionOrder:
    order = EvictionOrder(num_blocks)
    for block in blocks:
        add(order, block, tenant)
    return order


def add(order: Order, block: int, tenant: bytes = A, *, cold: bool = False) -> None:
    order.add(block, tenant, key=b"%d" % block, cold=cold)


def use(order: Order, block: int, tenant: bytes = A) -> None:
    order.remove(block)
    add(order, block, tenant)


def victims(order: Order, count: int) -> list[int]:
    return [order.victim(any_leaf) for _ in range(count)]


def any_leaf(_: int) -> bool:
    return True


def test_blocks_used_once_go_in_the_order_of_their_use() -> None:
    assert victims(order_of([3, 1, 2]), 3) == [3, 1, 2]


def test_a_block_used_again_outlives_a_scan() -> None:
    order = order_of([0, 1])
    use(order, 0)
    for block in range(2, 90):
        add(order, block)
    assert 0 not in victims(order, 89)
    assert victims(order, 1) == [0]


def test_a_block_that_is_used_no_more_goes_at_last() -> None:
    order = order_of([0])
    for _ in range(20):
        use(order, 0)
    for block in range(1, 1000):
        add(order, block)
        if block > 50:
            order.victim(any_leaf)
    assert 0 not in victims_left(order)


def victims_left(order: Order) -> list[int]:
    return victims(order, len(order))


def test_a_block_that_was_evicted_and_comes_back_has_kept_what_it_earned() -> None:
    order = order_of([0, 1])
    use(order, 0)
    assert victims(order, 2) == [1, 0]
    order.add(7, A, key=b"0")  # the same content in another block
    for block in range(10, 14):
        add(order, block)
    assert victims(order, 5) == [10, 11, 12, 13, 7]


def test_a_parent_outlives_its_children() -> None:
    assert order_of([0, 1, 2]).victim(lambda block: block == 2) == 2


def test_a_leaf_that_was_used_more_goes_before_a_lone_parent_that_was_used_once() -> None:
    order = order_of([0])
    use(order, 0)
    add(order, 1)
    assert order.victim(lambda block: block == 0) == 0
    assert victims_left(order) == [1]


def test_without_a_leaf_the_coldest_goes() -> None:
    assert order_of([4, 5]).victim(lambda _: False) == 4
    assert order_of(range(100)).victim(lambda _: False) == 0


def test_a_cold_block_goes_back_to_where_it_was() -> None:
    order = order_of([0, 1, 2])
    for block in order.coldest(2):
        order.remove(block)
    for block in (1, 0):  # a pool returns the last first
        add(order, block, cold=True)
    assert victims(order, 3) == [0, 1, 2]


def test_the_coldest_are_the_next_victims() -> None:
    order = order_of(range(20))
    for block in (0, 5, 6, 6):
        use(order, block)
    assert order.coldest(20) == victims(order, 20)


def test_a_tenant_above_its_share_pays_for_what_it_adds() -> None:
    order = order_of([0, 1, 2])
    for block in range(3, 10):
        add(order, block, B)
    # B holds seven of ten, then six of nine, five of eight, four of seven, and then its share.
    assert victims(order, 4) == [3, 4, 5, 6]
    assert victims_left(order) == [7, 8, 9, 0, 1, 2]


def test_spared_blocks_that_nobody_uses_go_at_last() -> None:
    order = order_of([0, 1])
    for block in range(2, 10):
        add(order, block, B)
    for block in range(10, 100):
        add(order, block, B)
        order.victim(any_leaf)
    assert set(victims_left(order)).isdisjoint({0, 1})


def test_a_lone_tenant_may_have_everything() -> None:
    assert victims(order_of(range(100)), 100) == list(range(100))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "cold", "remove", "victim", "coldest"]),
            st.integers(0, 15),
            st.sampled_from([A, B, C]),
        ),
        max_size=120,
    ),
    st.sets(st.integers(0, 15)),
    st.sampled_from([EvictionOrder, LruOrder]),
)
def test_every_block_comes_out_once_and_a_leaf_before_the_others(
    steps: list[tuple[str, int, bytes]], leaves: set[int], make: Callable[[int], Order]
) -> None:
    order = make(16)
    present: set[int] = set()
    for action, block, tenant in steps:
        if action in {"add", "cold"} and block not in present:
            add(order, block, tenant, cold=action == "cold")
            present.add(block)
        elif action == "remove" and block in present:
            order.remove(block)
            present.discard(block)
        elif action == "victim" and present:
            victim = order.victim(leaves.__contains__)
            assert victim in present
            if make is EvictionOrder:
                assert victim in leaves or not leaves & present
            present.discard(victim)
        elif action == "coldest":
            found = order.coldest(4)
            assert len(found) == len(set(found)) <= 4
            assert set(found) <= present
        assert len(order) == len(present)
    assert set(victims_left(order)) == present


@pytest.fixture(scope="module")
def trace() -> list[Request]:
    return conversation_trace()


def test_the_trace_is_whole(trace: list[Request]) -> None:
    assert len(trace) == 12_031
    assert sum(len(request.keys) for request in trace) == 288_500
    assert len({key for request in trace for key in request.keys}) == 182_790


@pytest.mark.parametrize(("num_blocks", "rate"), LRU_RATES.items())
def test_lru_finds_as_much_of_the_trace_as_an_independent_replay(
    num_blocks: int, rate: float, trace: list[Request]
) -> None:
    assert hit_rate(num_blocks, LruOrder(num_blocks), trace) == pytest.approx(rate, abs=0.0005)


def test_in_a_small_cache_we_find_a_third_more_of_the_trace_than_lru(trace: list[Request]) -> None:
    assert hit_rate(5_859, EvictionOrder(5_859), trace) == pytest.approx(0.180, abs=0.0005)


@pytest.mark.long
@pytest.mark.parametrize("num_blocks", [2_000, 12_000, 25_000, 50_000, *LRU_RATES])
def test_at_no_size_we_find_less_of_the_trace_than_lru(
    num_blocks: int, trace: list[Request]
) -> None:
    lru = hit_rate(num_blocks, LruOrder(num_blocks), trace)
    assert hit_rate(num_blocks, EvictionOrder(num_blocks), trace) >= lru


def test_what_was_used_once_outlives_a_flood_of_another_tenant() -> None:
    requests = [
        request
        for number in range(40)  # twenty prompts, each of which comes again once
        for request in flooded(
            [Request(range(number // 2 * 100, number // 2 * 100 + 20))], 10, first=number * 1_000
        )
    ]
    assert hit_rate(200, EvictionOrder(200), requests) > 0.45
    assert hit_rate(200, EvictionOrder(200, tenant_share=1.0), requests) < 0.1
    assert hit_rate(200, LruOrder(200), requests) == 0


def test_prefixes_outlive_a_flood_of_their_own_tenant(trace: list[Request]) -> None:
    requests = [
        request
        for number in range(40)  # a system prompt of 50 blocks, used now and then
        for request in flooded([Request(range(50))], 10, b"trace", first=number * 1_000)
    ]
    assert hit_rate(200, EvictionOrder(200), requests) > 0.9
    assert hit_rate(200, LruOrder(200), requests) == 0
