"""Loads: when requests come, what counts as met, how a goodput is found and what bounds it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from scripts.benchmarks.arrivals import FIRST_TOKEN, Mix, Planned, mix_of, new_prompts, plan
from scripts.benchmarks.arrivals import replayed as replay
from scripts.benchmarks.attainment import Outcome, Targets, attainment, most_missed
from scripts.benchmarks.clusters import service_settings
from scripts.benchmarks.http_streams import Streamed, request_bytes
from scripts.benchmarks.measure import core_list
from scripts.benchmarks.queueing import rate_bound, rate_kept_up, waits_at_most
from scripts.benchmarks.search import Search, confirm, find_rate

_HEAD = b"HTTP/1.1 200 OK\r\nkeep-alive: timeout=10\r\ntransfer-encoding: chunked\r\n\r\n"


def test_a_mix_is_read_from_its_name() -> None:
    assert mix_of("512/64") == Mix("512/64", 512, 64)
    assert mix_of("512/64/384") == Mix("512/64/384", 512, 64, 384)
    assert mix_of("trace").name == "trace"


@pytest.mark.parametrize("name", ["", "512", "a/b", "512/64/512", "512/0", "1/2/3/4", "-1/2"])
def test_a_mix_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="mix is"):
        mix_of(name)


def test_random_arrivals_have_their_rate_and_one_pattern_at_every_rate() -> None:
    slow, fast = (plan(mix_of("512/64"), 4000, rate, seed=1) for rate in (2.0, 4.0))
    assert slow[-1].at == pytest.approx(4000 / 2.0, rel=0.05)
    assert [each.at for each in slow] == pytest.approx([2 * each.at for each in fast])
    gaps = [later.at - sooner.at for sooner, later in pairwise(slow)]
    # Of exponential gaps the share that is longer than the mean is 1 / e.
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.03)
    assert {each[1:] for each in slow} == {(512, 64)}
    assert {each.at for each in plan(mix_of("512/64"), 3, 0.0, seed=1)} == {0.0}


def test_a_trace_keeps_its_pattern_at_another_rate() -> None:
    rows = [Planned(10.0, 5000, 30), Planned(11.0, 7, 300), Planned(14.0, 8, 20)]
    assert replay(rows, 1.5) == [Planned(0, 2048, 30), Planned(0.5, 7, 256), Planned(2, 8, 20)]
    assert {each.at for each in replay(rows, 0.0)} == {0.0}
    requests = plan(mix_of("trace"), 200, 2.0, seed=3)
    assert requests == plan(mix_of("trace"), 200, 2.0, seed=3) != plan(mix_of("trace"), 200, 2.0, 4)
    assert requests[0].at == 0
    assert requests[-1].at == pytest.approx(100)
    assert requests == sorted(requests, key=lambda each: each.at)


def test_prompts_are_new_but_for_what_they_share() -> None:
    planned = plan(mix_of("32/4/24"), 5, 1.0, seed=1)
    first, second = (new_prompts(planned, 24, 500) for _ in range(2))
    assert {tuple(prompt[:24]) for prompt in first} == {tuple(first[0][:24])}
    assert len({tuple(prompt) for prompt in first + second}) == 10
    assert first[0][:24] != second[0][:24]
    assert {len(prompt) for prompt in first} == {32}
    assert all(FIRST_TOKEN <= token < 500 for prompt in first for token in prompt)


def test_a_request_counts_if_it_meets_both_targets() -> None:
    targets = Targets(2.0, 0.04, 0.9)
    outcomes = [
        Outcome(0, ttft_s=2.0, tpot_s=0.04),
        Outcome(0, ttft_s=2.1, tpot_s=0.01),
        Outcome(0, ttft_s=0.1, tpot_s=0.05),
        Outcome(0, error="overloaded"),
    ]
    assert [each.meets(targets) for each in outcomes] == [True, False, False, False]
    assert attainment(outcomes, 5, targets) == pytest.approx(0.2)
    assert most_missed(100, 0.9) == 10
    assert most_missed(19, 0.9) == 1
    assert most_missed(10, 1.0) == 0


def _found(search: Search, meets: Callable[[float], bool]) -> float:
    """What it finds where rates do that."""
    try:
        rate = next(search)
        while True:
            rate = search.send(meets(rate))
    except StopIteration as ended:
        return float(ended.value)


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.5, 30.0])
@pytest.mark.parametrize("true", [0.2, 1.0, 1.234, 80.0])
def test_bisection_ends_within_its_precision_below_the_true_rate(
    factor: float, true: float
) -> None:
    start = factor * true
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= true

    found = _found(find_rate(start, 0.05), meets)
    assert true / 1.05 <= found <= true
    assert found in asked
    assert len(asked) == len(set(asked)) < 30


def test_no_rate_is_found_where_none_meets_the_targets() -> None:
    asked: list[float] = []

    def misses(rate: float) -> bool:
        asked.append(rate)
        return False

    assert _found(find_rate(2.0, 0.1), misses) == 0
    assert min(asked) > 2.0 / 70  # a lower one would take for ever
    assert _found(find_rate(1.0, 0.1), lambda _: True) > 1000  # and the search ends


def test_a_found_rate_is_lowered_until_a_run_of_its_own_meets_the_targets() -> None:
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return len(asked) == 3

    assert _found(confirm(1.0, 0.1), meets) == pytest.approx(1 / 1.21)
    assert asked == pytest.approx([1.0, 1 / 1.1, 1 / 1.21])
    assert _found(confirm(1.0, 0.5), lambda _: False) == 0
    assert _found(confirm(0.0, 0.5), lambda _: True) == 0


def test_waiting_times_are_those_of_a_simulated_queue() -> None:
    rate, service_s = 1.4, 0.5
    rng = random.Random(2)
    free_at = at = 0.0
    waits = []
    for _ in range(60_000):
        at += rng.expovariate(rate)
        waits.append(max(0.0, free_at - at))
        free_at = max(free_at, at) + service_s
    for limit in (0.0, 0.2, 0.5, 1.1, 3.0):
        share = sum(wait <= limit for wait in waits) / len(waits)
        assert waits_at_most(limit, rate, service_s) == pytest.approx(share, abs=0.02)
    assert waits_at_most(0.0, rate, service_s) == pytest.approx(1 - rate * service_s)


def test_waiting_times_are_a_distribution_even_far_out() -> None:
    shares = [waits_at_most(limit, 19.0, 0.05) for limit in (0, 0.1, 0.5, 1, 2, 4)]
    assert shares == sorted(shares)
    assert 0.04 < shares[0] < 0.06
    assert 0.999 < shares[-1] <= 1
    assert waits_at_most(1.0, 2.0, 0.5) == 0  # at full load nobody is served in time for ever
    assert waits_at_most(-0.1, 1.0, 0.5) == 0


def test_the_bound_is_where_the_share_is_just_met() -> None:
    bound = rate_bound(0.5, 2.0, 0.9)
    assert waits_at_most(1.5, bound, 0.5) == pytest.approx(0.9, abs=1e-6)
    assert 1.0 < bound < 2.0
    assert rate_bound(0.5, 1.5, 0.9) < bound < rate_bound(0.5, 2.0, 0.9, num_cores=2)
    assert rate_bound(3.0, 2.0, 0.9) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("rate", "num_requests"), [(2.5, 20), (2.5, 2000), (0.9, 20), (50.0, 40)])
def test_a_line_that_grows_until_a_loads_end_is_no_goodput(rate: float, num_requests: int) -> None:
    done_a_second, limit_s = rate_kept_up(rate, num_requests, 14.0), 14.0
    free_at, waits = 0.0, []
    for number in range(num_requests):
        at = number / rate
        waits.append(max(0.0, free_at - at))
        free_at = max(free_at, at) + 1 / done_a_second
    assert max(waits) == pytest.approx(limit_s * (num_requests - 1) / num_requests)


def _event(number: int, end: str = "null") -> bytes:
    body = b'data: {"choices":[{"text":"data: %d","finish_reason":%b}]}\n\n' % (
        number,
        end.encode(),
    )
    return b"%x\r\n%b\r\n" % (len(body), body)


def test_a_stream_is_timed_however_its_bytes_are_cut() -> None:
    parts = [_HEAD, _event(0), _event(1) + _event(2), _event(3, '"length"')]
    parts.append(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    whole = Streamed(10.0)
    for now, part in enumerate(parts, 11):
        assert not whole.is_over
        whole.feed(part, now)
    assert whole.token_times == [12, 13, 13, 14]
    assert (whole.ttft, whole.gaps) == (2, [1, 0, 1])
    assert whole.is_over
    assert whole.is_full
    assert not whole.error
    text = b"".join(parts)
    for size in (1, 3, 7, 64):
        cut = Streamed(0.0)
        cut.feed(text[:20], 0.0)
        for at in range(20, len(text), size):
            assert not cut.is_over
            cut.feed(text[at : at + size], at)
        assert (cut.num_tokens, cut.is_over, cut.is_full) == (4, True, True)
        assert cut.token_times == sorted(cut.token_times)


def test_a_stream_that_fails_or_stops_early_is_told_apart() -> None:
    early = Streamed(0.0)
    early.feed(_HEAD + _event(0) + _event(1, '"stop"') + b"0\r\n\r\n", 1.0)
    assert (early.is_over, early.is_full, early.num_tokens) == (True, False, 2)
    failed = Streamed(0.0)
    failed.feed(_HEAD + b'18\r\ndata: {"error":"no room"}\n\n\r\n0\r\n\r\n', 1.0)
    assert "no room" in failed.error
    with pytest.raises(RuntimeError, match="429"):
        Streamed(0.0).feed(b"HTTP/1.1 429 Too Many Requests\r\n\r\n", 1.0)


def test_a_request_is_whole_http() -> None:
    head, _, body = request_bytes([1, 2], 3, temperature=0).partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert b'"prompt": [1, 2]' in body
    assert b'"temperature": 0' in body


def test_settings_and_cores_are_read() -> None:
    settings = service_settings("gateway.max_wait_s=9,worker.threads=2")
    assert settings["gateway"] == {"max_wait_s": "9"}
    assert settings["worker"] == {"threads": "2"}
    assert not settings["store"]
    for wrong in ("threads=2", "worker.threads", "nobody.x=1"):
        with pytest.raises(ValueError, match=r"SERVICE\.SETTING=VALUE"):
            service_settings(wrong)
    assert core_list("0,2-4") == [0, 2, 3, 4]
    assert core_list(None) is None
