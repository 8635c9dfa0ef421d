"""What a store tells an operator of itself and its members. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.messages import Load, Member
from kvbaton.operations import MemberStatus, StoreStatus
from kvbaton.version import VERSION
from services.kvstore.audit_rows import handoffs_by_state
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members


def store_status(name: str, age_s: float, ledger: Ledger | None) -> StoreStatus:
    """The store itself; without a ledger before the first worker has joined."""
    status = StoreStatus(name=name, version=VERSION, age_s=age_s)
    if ledger is None:
        return status
    blocks = ledger.pool.counts()
    return StoreStatus(
        name=name,
        version=VERSION,
        age_s=age_s,
        num_blocks=sum(blocks.values()),
        blocks=blocks,
        handoffs=handoffs_by_state(ledger),
        num_waiting=ledger.num_waiting,
    )


def member_statuses(members: Members, lost: Sequence[Member], now: float) -> Iterator[MemberStatus]:
    """Everyone who is here, then those who are lost and may still be at work."""
    for member in members.everyone():
        age_s = now - members.joined_at(member.member_id)
        is_ready = member.role == "gateway" or members.is_ready(member.member_id)
        yield _status(member, _state(member.load, is_ready), age_s)
    for member in lost:
        yield _status(member, "lost", None)


def _state(load: Load, is_ready: bool) -> str:
    if not is_ready:
        return "joining"
    if not load.is_draining:
        return "ready"
    return "draining" if load.num_running + load.num_waiting else "drained"


def _status(member: Member, state: str, age_s: float | None) -> MemberStatus:
    load = member.load
    return MemberStatus(
        member_id=member.member_id,
        name=member.name,
        role=member.role,
        state=state,
        version=member.version,
        age_s=age_s,
        host_id=member.host_id,
        pid=member.pid,
        endpoint=member.endpoint,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_places=member.max_num_seqs,
        num_tokens_queued=load.num_tokens_queued,
        tokens_per_s=load.tokens_per_s,
    )
