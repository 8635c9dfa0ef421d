"""The rows of an audit: who owns what at a store, and what each waits for. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.messages import Member
from kvbaton.admin import (
    MAX_EVENT_BLOCKS,
    MAX_EVENTS,
    MAX_ROWS,
    HandoffAudit,
    HistoryEvent,
    MemberAudit,
    StoreAudit,
    StoreHistory,
)
from services.kvstore.blocks import BlockState
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.history import Event, goes_by
from services.kvstore.ledger import Ledger
from services.kvstore.staging import WRITER as DISK

Name = Callable[[str], str]  # a member's name for people, by its id


def store_audit(
    ledger: Ledger,
    here: Iterable[Member],
    lost: Iterable[Member],
    answers: Mapping[str, str],
    *,
    name: Name,
    ages: Mapping[str, float],
    discrepancies: list[str],
    warnings: list[str],
) -> StoreAudit:
    """All of it. `answers`: what became of asking each member; `ages` of handoffs in seconds."""
    oldest = sorted(ledger.handoffs.values(), key=lambda each: -ages.get(each.handoff_id, 0.0))
    return StoreAudit(
        num_blocks=ledger.pool.num_blocks,
        blocks=ledger.pool.counts(),
        num_reserved=ledger.num_reserved,
        num_waiting=ledger.num_waiting,
        handoffs=handoffs_by_state(ledger),
        members=_member_rows(ledger, here, lost, answers)[:MAX_ROWS],
        oldest_handoffs=[
            _handoff_row(each, ages.get(each.handoff_id), name) for each in oldest[:MAX_ROWS]
        ],
        discrepancies=_bounded(discrepancies),
        warnings=_bounded(warnings),
    )


def handoffs_by_state(ledger: Ledger) -> dict[str, int]:
    """How many handoffs stand where, in the order of their states."""
    found = Counter(handoff.state for handoff in ledger.handoffs.values())
    return {state.value: found[state] for state in HandoffState}


def _bounded(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_ROWS:
        return lines
    return [*lines[: MAX_ROWS - 1], f"and {len(lines) - MAX_ROWS + 1} more"]


# ---- members ----------------------------------------------------------------------------------


def _member_rows(
    ledger: Ledger,
    here: Iterable[Member],
    lost: Iterable[Member],
    answers: Mapping[str, str],
) -> list[MemberAudit]:
    granted, leased, quarantined = _by_writer(ledger)
    rows = []
    for state, members in (("here", here), ("lost", lost)):
        for member in members:
            member_id = member.member_id
            held = quarantined.get(member_id, [])
            if member.role == "gateway" and not held and state == "here":
                continue
            rows.append(
                MemberAudit(
                    member_id=member_id,
                    name=member.name,
                    role=member.role,
                    state=state,
                    num_granted=granted[member_id],
                    num_leased=leased[member_id],
                    num_quarantined=len(held),
                    quarantined=held[:MAX_ROWS],
                    answer=answers.get(member_id, ""),
                    waits_for=_waits_for_member(ledger, member, state, bool(held)),
                )
            )
    if leased[DISK] or ledger.staging.writing:
        rows.append(
            MemberAudit(
                member_id=DISK,
                name="disk",
                role="disk",
                num_leased=leased[DISK],
                waits_for=f"it reads {len(ledger.staging.writing)} blocks to write them",
            )
        )
    return rows


def _by_writer(ledger: Ledger) -> tuple[Counter[str], Counter[str], dict[str, list[int]]]:
    """By member id: blocks granted through handoffs, blocks granted to itself, and the quarantined
    ones that it may still be writing."""
    granted: Counter[str] = Counter()
    leased: Counter[str] = Counter()
    quarantined: dict[str, list[int]] = {}
    for block_id in range(ledger.pool.num_blocks):
        block = ledger.pool[block_id]
        if not block.writer:
            continue
        handoff = ledger.handoffs.get(block.writer)
        member_id = block.writer if handoff is None else handoff.writer
        if block.state is BlockState.QUARANTINED:
            quarantined.setdefault(member_id, []).append(block_id)
        elif handoff is None:
            leased[member_id] += 1
        else:
            granted[member_id] += 1
    return granted, leased, quarantined


def _waits_for_member(ledger: Ledger, member: Member, state: str, holds: bool) -> str:
    if state == "lost":
        if member.role == "gateway":
            return f"{member.name} must end or come back: it may still pass tokens on"
        return f"{member.name} must end, or come back and say that it has stopped"
    ending = any(
        handoff.state is HandoffState.ABORTING and handoff.writer == member.member_id
        for handoff in ledger.handoffs.values()
    )
    return f"{member.name} must end its step" if holds or ending else ""


# ---- handoffs ---------------------------------------------------------------------------------


def _handoff_row(handoff: Handoff, age_s: float | None, name: Name) -> HandoffAudit:
    return HandoffAudit(
        handoff_id=handoff.handoff_id,
        request_id=handoff.request_id,
        state=handoff.state.value,
        age_s=age_s,
        gateway=name(handoff.gateway_id),
        prefill=name(handoff.prefill_id),
        decode=name(handoff.decode_id),
        holder=name(handoff.writer) if handoff.writer else "",
        num_committed=handoff.num_committed,
        num_granted=len(handoff.blocks) - handoff.num_committed,
        num_reserved=handoff.num_reserved,
        waits_for=_waits_for(handoff, name),
    )


def _waits_for(handoff: Handoff, name: Name) -> str:
    writer = name(handoff.writer)
    if handoff.state is HandoffState.ABORTING and not handoff.is_fenced:
        return f"{writer} to quit or end, {name(handoff.gateway_id)} to confirm or end"
    return {
        HandoffState.WAITING: "room for its blocks",
        HandoffState.RESERVED: f"{name(handoff.prefill_id)} to begin",
        HandoffState.FILLING: f"{writer} to compute the prompt",
        HandoffState.SEALED: f"{name(handoff.decode_id)} to claim it",
        HandoffState.CLAIMED: f"{writer} to finish",
        HandoffState.ABORTING: f"{writer} to quit or end",
        HandoffState.HELD: f"{name(handoff.gateway_id)} to go on from it elsewhere",
    }[handoff.state]


# ---- history ----------------------------------------------------------------------------------


def store_history(
    events: list[Event], now: float, *, standing: str, num_forgotten: int, name: Name
) -> StoreHistory:
    """The last of these events, oldest first. `standing`: how things are now, in words."""
    return StoreHistory(
        now=standing,
        events=[_history_event(event, now, name) for event in events[-MAX_EVENTS:]],
        num_cut=max(0, len(events) - MAX_EVENTS),
        num_forgotten=num_forgotten,
    )


def _history_event(event: Event, now: float, name: Name) -> HistoryEvent:
    named = zip(event.blocks[:MAX_EVENT_BLOCKS], event.stamps, strict=False)
    return HistoryEvent(
        age_s=now - event.at,
        event=event.name,
        handoff_id=event.handoff_id,
        request_id=event.request_id,
        member=name(event.member_id) if event.member_id else "",
        num_blocks=len(event.blocks),
        blocks=list(named),
        detail=event.detail,
    )


def standing_of_block(ledger: Ledger, block_id: int, name: Name) -> str:
    """How a block stands now, in words."""
    if block_id >= ledger.pool.num_blocks:
        return f"there is no such block: they are numbered from 0 to {ledger.pool.num_blocks - 1}"
    block = ledger.pool[block_id]
    text = f"{block.state.value}, stamp {block.stamp}"
    if block.writer:
        handoff = ledger.handoffs.get(block.writer)
        writer = name(block.writer if handoff is None else handoff.writer)
        text += f", may be written by {writer or 'no one'}"
    if block.num_readers:
        text += f", read by {block.num_readers}"
    if block.state in (BlockState.COMMITTED, BlockState.CACHED):
        text += ", can be found by its key" if block.name else ", cannot be found by a key"
    return text


def standing_of_requests(ledger: Ledger, names: Sequence[str]) -> str:
    """How the handoffs of these names, or of requests of these names, stand now, in words."""
    handoffs = [
        handoff
        for handoff in ledger.handoffs.values()
        if goes_by(handoff.handoff_id, handoff.request_id, names)
    ]
    return ", ".join(f"handoff {h.handoff_id} is {h.state.value}" for h in handoffs)
