"""Members by value: who is shown to gateways, and who is lost."""

from __future__ import annotations

from common.messages import Load, Member
from services.kvstore.members import Members


def member_of(member_id: str, role: str = "decode") -> Member:
    return Member(member_id=member_id, role=role, name=role, host_id="host", pid=1)


def members_of(*members: Member) -> Members:
    """All joined at time 0."""
    joined = Members(lost_after_s=8.0)
    for member in members:
        joined.join(member, 0.0)
    return joined


def test_a_worker_is_shown_once_it_is_ready() -> None:
    members = members_of(member_of("a"))
    assert "a" in members
    assert members.workers() == []
    assert not members.heard("a", Load(), ready=False, now=1.0)
    assert members.heard("a", Load(), ready=True, now=2.0)
    assert [each.member_id for each in members.workers()] == ["a"]


def test_a_worker_becomes_ready_once() -> None:
    members = members_of(member_of("a"))
    members.heard("a", Load(), ready=True, now=1.0)
    assert not members.heard("a", Load(), ready=True, now=2.0)


def test_workers_are_shown_with_the_load_they_told_last() -> None:
    members = members_of(member_of("a"))
    members.heard("a", Load(num_running=3), ready=True, now=1.0)
    assert members.workers()[0].load.num_running == 3


def test_workers_are_shown_in_a_fixed_order() -> None:
    members = members_of(member_of("b"), member_of("a", "prefill"))
    for member_id in ("b", "a"):
        members.heard(member_id, Load(), ready=True, now=1.0)
    assert [each.member_id for each in members.workers()] == ["a", "b"]


def test_a_worker_that_has_gone_is_shown_no_more() -> None:
    members = members_of(member_of("a"))
    members.heard("a", Load(), ready=True, now=1.0)
    members.remove("a")
    assert members.workers() == []
    members.join(member_of("a"), 2.0)
    assert members.workers() == []


def test_a_member_is_removed_once() -> None:
    member = member_of("a")
    members = members_of(member)
    assert members.remove("a") == member
    assert members.remove("a") is None
    assert "a" not in members


def test_a_silent_member_expires_and_one_that_was_heard_does_not() -> None:
    members = members_of(member_of("a"), member_of("b"))
    members.heard("b", Load(), ready=False, now=5.0)
    assert members.expire(7.9) == []
    assert members.expire(8.0) == ["a"]
    assert members.expire(13.0) == ["b"]


def test_a_removed_member_does_not_expire_later() -> None:
    members = members_of(member_of("a"))
    members.remove("a")
    assert members.expire(100.0) == []


def test_gateways_are_told_and_not_shown() -> None:
    members = members_of(member_of("g", "gateway"), member_of("p", "prefill"))
    assert [each.member_id for each in members.gateways()] == ["g"]
    assert members.num_workers() == 1
