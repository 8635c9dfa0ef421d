"""Token buckets: what they let through, and for how long they do not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.access.quotas import Bucket, Charge, Limits, Quota, Refusal


def test_a_bucket_is_full_at_first_and_fills_evenly() -> None:
    bucket = Bucket("x", 60, 60.0, now=5.0)
    assert bucket.wait_s(60, 5.0) == 0
    bucket.take(60, 5.0)
    assert bucket.wait_s(1, 5.0) == 1.0
    assert bucket.wait_s(10, 8.0) == 7.0
    assert bucket.wait_s(60, 1000.0) == 0
    bucket.take(1, 1000.0)
    assert bucket.wait_s(60, 1000.0) == 1.0


def test_what_is_larger_than_the_bucket_leaves_a_debt() -> None:
    bucket = Bucket("x", 10, 10.0, now=0.0)
    assert bucket.wait_s(25, 0.0) == 0
    bucket.take(25, 0.0)
    assert bucket.wait_s(1, 0.0) == 16.0
    assert bucket.wait_s(25, 20.0) == 5.0


def test_giving_back_fills_no_more_than_the_bucket() -> None:
    bucket = Bucket("x", 10, 10.0, now=0.0)
    bucket.take(4, 0.0)
    bucket.give_back(100)
    bucket.take(10, 0.0)
    assert bucket.wait_s(1, 0.0) == 1.0


def test_the_limit_that_takes_longest_is_named_and_nothing_is_taken() -> None:
    quota = Quota(Limits(tokens_per_minute=60, tokens_per_day=100), 0.0)
    assert quota.take_tokens(50, 0.0) is None
    assert quota.take_tokens(55, 0.0) == Refusal("tokens_per_day = 100", 5 * 864.0)
    assert quota.take_tokens(45, 0.0) == Refusal("tokens_per_minute = 60", 35.0)
    assert quota.take_tokens(10, 0.0) is None
    assert quota.take_request(0.0) is None


def test_a_charge_gives_back_what_is_not_used_once() -> None:
    quota = Quota(Limits(tokens_per_minute=100), 0.0)
    assert quota.take_tokens(80, 0.0) is None
    charge = Charge(quota, 80)
    charge.settle(30)
    charge.settle(30)
    refusal = quota.take_tokens(71, 0.0)
    assert refusal is not None
    assert quota.take_tokens(70, 0.0) is None


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 30)), max_size=60))
def test_never_more_than_a_bucket_beyond_what_flows_in(asks: list[tuple[int, float]]) -> None:
    size, period_s = 50, 60.0
    bucket = Bucket("x", size, period_s, now=0.0)
    now, taken = 0.0, 0
    for amount, pause_s in asks:
        now += pause_s
        wait_s = bucket.wait_s(amount, now)
        if wait_s == 0:
            bucket.take(amount, now)
            taken += amount
        else:
            assert bucket.wait_s(amount, now + wait_s + 1e-6) == 0
        assert taken <= size + now * size / period_s + 1e-6
