"""What an operator can learn of a cluster through a gateway. docs/protocol.md is normative."""

from __future__ import annotations

import msgspec

MAX_EVENTS = 500  # in one answer, of each store
MAX_EVENT_BLOCKS = 32  # named in one event
MAX_ROWS = 500  # members, handoffs, discrepancies or warnings of one store
MAX_ID_CHARS = 256


class MemberAudit(msgspec.Struct, kw_only=True, frozen=True):
    """What a member of a store may write, or may still be writing. `role` "disk" is the store's own
    disk tier. `answer` tells what the member itself says."""

    member_id: str
    name: str
    role: str
    state: str = "here"
    num_granted: int = 0
    num_leased: int = 0
    num_quarantined: int = 0
    quarantined: list[int] = []
    answer: str = ""
    waits_for: str = ""


class HandoffAudit(msgspec.Struct, kw_only=True, frozen=True):
    """A handoff that is not over. Members go by their names."""

    handoff_id: str
    request_id: str
    state: str
    age_s: float | None = None
    gateway: str = ""
    prefill: str = ""
    decode: str = ""
    holder: str = ""
    num_committed: int = 0
    num_granted: int = 0
    num_reserved: int = 0
    waits_for: str = ""


class StoreAudit(msgspec.Struct, kw_only=True, frozen=True):
    """The books of one store. They close if there is no problem and no discrepancy."""

    store: int = 0
    endpoint: str = ""
    problem: str = ""
    num_blocks: int = 0
    blocks: dict[str, int] = {}
    num_reserved: int = 0
    num_waiting: int = 0
    handoffs: dict[str, int] = {}
    members: list[MemberAudit] = []
    oldest_handoffs: list[HandoffAudit] = []
    discrepancies: list[str] = []
    warnings: list[str] = []

    @property
    def closes(self) -> bool:
        """Whether every count was told and agrees with every other."""
        return not self.problem and not self.discrepancies


class HistoryEvent(msgspec.Struct, kw_only=True, frozen=True):
    """A transition of a handoff or of blocks. `blocks` are pairs of a block and its stamp, the
    first of `num_blocks`."""

    age_s: float
    event: str
    handoff_id: str = ""
    request_id: str = ""
    member: str = ""
    num_blocks: int = 0
    blocks: list[tuple[int, int]] = []
    detail: str = ""


class StoreHistory(msgspec.Struct, kw_only=True, frozen=True):
    """What a store remembers of a block or a request, oldest first. `now` is how things stand."""

    store: int = 0
    endpoint: str = ""
    problem: str = ""
    now: str = ""
    events: list[HistoryEvent] = []
    num_cut: int = 0
    num_forgotten: int = 0
