"""Which requests a gateway takes: by number, by tokens that wait, and by the wait to expect."""

from __future__ import annotations

import random
from collections import deque

import pytest

from kvbaton.errors import OverloadedError
from services.gateway.routing.admission import Admission

RATE = 100.0  # prompt tokens a second that this cluster computes
PROMPT = 50


def admission(max_requests: int = 1000, max_tokens: int = 10**6, wait_s: float = 5) -> Admission:
    return Admission(max_requests=max_requests, max_tokens=max_tokens, max_wait_s=wait_s)


def test_no_more_requests_than_allowed_and_another_once_one_has_ended() -> None:
    taken = admission(max_requests=2)
    taken.take("a", 1, 0.0)
    taken.take("b", 1, 0.0)
    with pytest.raises(OverloadedError, match="serves 2 requests"):
        taken.take("c", 1, 0.0)
    taken.end("a", 0.0)
    taken.take("c", 1, 0.0)


def test_tokens_that_wait_are_bounded_but_a_long_prompt_alone_is_taken() -> None:
    taken = admission(max_tokens=100)
    taken.take("long", 500, 0.0)
    with pytest.raises(OverloadedError, match=r"500 tokens already wait.*lets 100 wait"):
        taken.take("next", 1, 0.0)
    taken.first_token("long", 1.0)
    taken.take("next", 1, 1.0)


def test_without_evidence_nobody_is_refused_for_the_wait() -> None:
    taken = admission(wait_s=0.1)
    for number in range(500):
        taken.take(number, PROMPT, number * 0.001)
    taken.first_token(0, 0.6)
    taken.take("more", PROMPT, 0.7)


class Cluster:
    """Computes one prompt after the other at RATE; requests come at `load` times that."""

    def __init__(self, taken: Admission, load: float, seed: int) -> None:
        self.taken = taken
        self.waits: list[float] = []
        self.refusals: list[OverloadedError] = []
        self._rng = random.Random(seed)
        self._queue: deque[tuple[int, float]] = deque()
        self._load = load
        self._done_at = 0.0

    def run(self, duration_s: float) -> int:
        """Returns how many first tokens came."""
        now, number, num_done = 0.0, 0, 0
        while now < duration_s:
            now += self._rng.expovariate(self._load * RATE / PROMPT)
            while self._queue and self._done_at <= now:
                done, came_at = self._queue.popleft()
                self.taken.first_token(done, self._done_at)
                self.taken.end(done, self._done_at)
                self.waits.append(self._done_at - PROMPT / RATE - came_at)
                self._done_at += PROMPT / RATE
                num_done += 1
            number += 1
            try:
                self.taken.take(number, PROMPT, now)
            except OverloadedError as refusal:
                self.refusals.append(refusal)
                continue
            if not self._queue:
                self._done_at = now + PROMPT / RATE
            self._queue.append((number, now))
        return num_done


@pytest.mark.parametrize("seed", range(5))
def test_three_times_what_can_be_served_keeps_all_busy_and_waits_within_the_limit(
    seed: int,
) -> None:
    cluster = Cluster(admission(wait_s=5), load=3, seed=seed)
    assert cluster.run(600) > 0.95 * 600 * RATE / PROMPT
    late = sorted(cluster.waits)[int(0.99 * len(cluster.waits))]
    assert 4 < late < 7
    assert len(cluster.refusals) > 1000
    assert all(1 <= (refusal.retry_after_s or 0) <= 5 for refusal in cluster.refusals)
    assert "lets requests wait 5 s" in str(cluster.refusals[0])


@pytest.mark.parametrize("seed", range(5))
def test_a_cluster_that_keeps_up_refuses_nobody(seed: int) -> None:
    cluster = Cluster(admission(wait_s=10), load=0.7, seed=seed)
    cluster.run(600)
    assert cluster.refusals == []


def test_when_nothing_begins_any_more_the_wait_grows_until_requests_are_refused() -> None:
    taken = admission(wait_s=5)
    for number in range(40):  # one a second, each at once
        taken.take(number, PROMPT, number)
        taken.first_token(number, number + 0.5)
        taken.end(number, number + 0.5)
    for number in range(40, 120):
        try:
            taken.take(number, PROMPT, number)
        except OverloadedError:
            break
    else:
        pytest.fail("nobody was refused")
    assert number < 60


def test_what_goes_on_from_another_gateway_has_waited_already() -> None:
    cluster = Cluster(taken := admission(wait_s=1), load=3, seed=1)
    cluster.run(60)
    with pytest.raises(OverloadedError):
        taken.take("new", PROMPT, 60.0)
    taken.take("resumed", PROMPT, 60.0, is_new=False)


def test_requests_that_end_without_a_token_wait_no_more() -> None:
    taken = admission(max_tokens=100)
    taken.take("a", 100, 0.0)
    taken.end("a", 1.0)
    taken.take("b", 100, 1.0)
    assert taken.num_requests == 1
