"""Who may write into the arena, and when that has ended: by its own word, or by its death."""

from __future__ import annotations

from collections.abc import Callable

from common.messages import Member
from common.seams import Processes


class Writers:
    """Members of this host, watched until they have stopped.

    In shared memory nobody can fence a store instruction, so silence proves nothing.
    """

    def __init__(self, processes: Processes, host_id: str) -> None:
        self._processes = processes
        self._host_id = host_id
        self._unwatch: dict[str, Callable[[], None]] = {}
        self._lost: dict[str, Member] = {}  # no members any more, and not known to have stopped

    def may_write(self, member: Member) -> bool:
        """Whether the member maps the arena."""
        if member.role == "gateway" or member.mover == "zmq":
            return False
        return member.mover == "shm" or member.host_id == self._host_id

    def cannot_harm(self, member: Member) -> bool:
        """Whether it is all the same what the member does once it is lost: it writes into memory of
        its own, and is no gateway, which may yet take tokens for good."""
        return member.role != "gateway" and not self.may_write(member)

    def watch(self, member: Member, ended: Callable[[], None]) -> None:
        """Call `ended` when the member's process ends, if it can be seen from here."""
        if member.host_id == self._host_id and member.member_id not in self._unwatch:
            self._unwatch[member.member_id] = self._processes.on_exit(member.pid, ended)

    def started_at(self, member: Member) -> int:
        """When the member's process began, as far as it can be seen from here; else 0."""
        is_here = member.host_id == self._host_id
        return self._processes.started_at(member.pid) if is_here else 0

    def has_ended(self, member: Member, started_at: int) -> bool:
        """Whether its number is another process's by now; ask once it is watched."""
        now = self.started_at(member)
        return now > 0 < started_at and now != started_at

    def lost(self, member: Member) -> None:
        """The member is gone and may still write: it can yet say that it has stopped."""
        self._lost[member.member_id] = member

    def get_lost(self, member_id: str) -> Member | None:
        """A lost member that is not known to have stopped."""
        return self._lost.get(member_id)

    def all_lost(self) -> list[Member]:
        """The lost members that are not known to have stopped."""
        return list(self._lost.values())

    def stopped(self, member_id: str) -> None:
        """The member writes no more."""
        self._lost.pop(member_id, None)
        unwatch = self._unwatch.pop(member_id, None)
        if unwatch is not None:
            unwatch()

    def close(self) -> None:
        """Watch nobody any more."""
        for unwatch in self._unwatch.values():
            unwatch()
        self._unwatch.clear()


def is_same_process(one: Member, other: Member) -> bool:
    """Whether two members are incarnations of one process."""
    return (one.host_id, one.pid, one.endpoint) == (other.host_id, other.pid, other.endpoint)
