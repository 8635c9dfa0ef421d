"""The answers under way, for those who ask how many there are or want one ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Abortable(Protocol):
    """An answer that can be ended."""

    def abort(self) -> None:
        """End it with an error. Idempotent."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Whose answer it is. Clients choose ids, so several answers may have one."""

    request_id: str
    tenant: str


class Running:
    """All answers of one gateway."""

    def __init__(self) -> None:
        self._answers: dict[str, dict[Abortable, str]] = {}  # tenants by answer, by request id
        self.num_answers = 0

    def add(self, ticket: Ticket, answer: Abortable) -> None:
        self._answers.setdefault(ticket.request_id, {})[answer] = ticket.tenant
        self.num_answers += 1

    def remove(self, ticket: Ticket, answer: Abortable) -> None:
        answers = self._answers[ticket.request_id]
        del answers[answer]
        if not answers:
            del self._answers[ticket.request_id]
        self.num_answers -= 1

    def abort(self, request_ids: Iterable[str] | None, tenant: str | None) -> int:
        """End the answers of these ids, None for all, that are the tenant's, None for anybody's.
        Returns how many."""
        wanted = self._answers if request_ids is None else set(request_ids)
        found = [
            answer
            for request_id in wanted
            for answer, owner in self._answers.get(request_id, {}).items()
            if tenant is None or owner == tenant
        ]
        for answer in found:
            answer.abort()
        return len(found)
