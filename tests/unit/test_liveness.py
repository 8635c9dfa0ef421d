"""Liveness by value, and that nobody is lost early or twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.net.liveness import Liveness


def test_a_peer_is_lost_after_the_timeout_and_not_before() -> None:
    liveness: Liveness[str] = Liveness(2.0)
    liveness.heard("a", 10.0)
    assert liveness.expire(11.9) == []
    assert liveness.expire(12.0) == ["a"]


def test_a_lost_peer_is_told_once() -> None:
    liveness: Liveness[str] = Liveness(2.0)
    liveness.heard("a", 10.0)
    liveness.expire(12.0)
    assert liveness.expire(20.0) == []


def test_a_sign_of_life_counts_from_when_it_came() -> None:
    liveness: Liveness[str] = Liveness(2.0)
    liveness.heard("a", 10.0)
    liveness.heard("b", 10.5)
    liveness.heard("a", 11.0)
    assert liveness.expire(12.5) == ["b"]
    assert liveness.expire(13.0) == ["a"]


def test_a_peer_that_was_forgotten_is_not_lost() -> None:
    liveness: Liveness[str] = Liveness(2.0)
    liveness.heard("a", 10.0)
    liveness.forget("a")
    liveness.forget("a")
    assert liveness.expire(20.0) == []


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.floats(0, 3), st.sampled_from(["heard", "forget", "expire"])
    )
)


@given(EVENTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_lost_are_exactly_those_not_heard_from_for_the_timeout(
    events: list[tuple[str, float, str]],
) -> None:
    liveness: Liveness[str] = Liveness(2.0)
    heard_at: dict[str, float] = {}
    now = 0.0
    for peer, pause, event in events:
        now += pause
        if event == "heard":
            liveness.heard(peer, now)
            heard_at[peer] = now
        elif event == "forget":
            liveness.forget(peer)
            heard_at.pop(peer, None)
        else:
            lost = {each for each, at in heard_at.items() if now - at >= 2.0}
            assert set(liveness.expire(now)) == lost
            for each in lost:
                del heard_at[each]
