"""Who belongs to the cluster, as heard from lately. Pure: time is passed in."""

from __future__ import annotations

import msgspec

from common.messages import Load, Member, WorkerCounts
from common.net.liveness import Liveness


class Members:
    """The members of one store, by id. A process that says hello again is a new member."""

    def __init__(self, lost_after_s: float) -> None:
        self._members: dict[str, Member] = {}
        self._ready: set[str] = set()
        self._joined_at: dict[str, float] = {}
        self._liveness: Liveness[str] = Liveness(lost_after_s)

    def __contains__(self, member_id: str) -> bool:
        return member_id in self._members

    def get(self, member_id: str) -> Member | None:
        """The member, if it is one."""
        return self._members.get(member_id)

    def role_of(self, member_id: str) -> str | None:
        """The member's role; None if it is none."""
        member = self._members.get(member_id)
        return None if member is None else member.role

    def join(self, member: Member, now: float) -> None:
        """A worker is not shown to gateways before it is ready."""
        self._members[member.member_id] = member
        self._joined_at[member.member_id] = now
        self._liveness.heard(member.member_id, now)

    def heard(
        self,
        member_id: str,
        load: Load,
        ready: bool,
        now: float,
        counts: WorkerCounts | None = None,
    ) -> bool:
        """A heartbeat. True if gateways must know at once: the member has become ready by it, or
        takes no more work."""
        member = self._members[member_id]
        self._liveness.heard(member_id, now)
        if (load, counts) != (member.load, member.counts):
            self._members[member_id] = msgspec.structs.replace(member, load=load, counts=counts)
        is_new = ready and member_id not in self._ready
        if is_new:
            self._ready.add(member_id)
        return is_new or load.is_draining != member.load.is_draining

    def is_ready(self, member_id: str) -> bool:
        """Whether a worker can take work."""
        return member_id in self._ready

    def joined_at(self, member_id: str) -> float:
        """When a member has joined."""
        return self._joined_at[member_id]

    def remove(self, member_id: str) -> Member | None:
        """The member has left or is lost. None if it was removed before."""
        self._liveness.forget(member_id)
        self._ready.discard(member_id)
        self._joined_at.pop(member_id, None)
        return self._members.pop(member_id, None)

    def expire(self, now: float) -> list[str]:
        """Members not heard from for too long; the caller removes them."""
        return self._liveness.expire(now)

    def next_expiry(self, now: float) -> float:
        """When to look again for members that are lost."""
        return self._liveness.next_expiry(now)

    def workers(self) -> list[Member]:
        """The workers that can take work."""
        return [self._members[member_id] for member_id in sorted(self._ready)]

    def everyone(self) -> list[Member]:
        """All members, ready or not."""
        return list(self._members.values())

    def gateways(self) -> list[Member]:
        """The gateways, ready or not: they are told of the workers."""
        return [member for member in self._members.values() if member.role == "gateway"]

    def prefill_rate(self) -> float:
        """Tokens per second at which the fastest worker computes prompts; 0 if not known."""
        loads = [member.load for member in self._members.values() if member.role != "gateway"]
        return max((load.tokens_per_s for load in loads), default=0.0)

    def num_workers(self) -> int:
        """Workers of any state."""
        return sum(member.role != "gateway" for member in self._members.values())
