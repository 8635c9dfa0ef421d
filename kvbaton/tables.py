"""Answers to an operator as headings, tables and remarks; drawn by rich on a terminal if it is
installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbaton.admin import HistoryEvent, StoreAudit, StoreHistory
from kvbaton.protocol import Audited, Told

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Table:
    """A table with a title line above it."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


Part = str | Table


def audit_parts(audited: Audited) -> Iterator[Part]:
    """The books of every store, and the verdict last."""
    for store in audited.stores:
        yield from _store_parts(store)
    if audited.closes:
        yield "The audit closes."
        return
    num = sum(len(store.discrepancies) for store in audited.stores)
    num_silent = sum(bool(store.problem) for store in audited.stores)
    reasons = [f"{num} discrepancies"] if num else []
    reasons += [f"{num_silent} KV stores could not be asked"] if num_silent else []
    yield f"The audit does not close: {', '.join(reasons) or 'the gateway says so'}."


def _store_parts(store: StoreAudit) -> Iterator[Part]:
    title = f"KV store {store.store} at {store.endpoint}"
    if store.problem:
        yield f"{title}: {store.problem}"
        return
    counts = {**store.blocks, "total": store.num_blocks, "reserved": store.num_reserved}
    yield Table(title, ("blocks", "number"), [(name, str(n)) for name, n in counts.items()])
    if store.handoffs:
        rows = [(state, str(count)) for state, count in store.handoffs.items()]
        yield Table("", ("handoffs", "number"), rows)
    if store.members:
        yield Table(
            "",
            ("holder", "state", "granted", "leased", "quarantined", "says", "waits for"),
            [
                (
                    each.name,
                    each.state,
                    str(each.num_granted),
                    str(each.num_leased),
                    str(each.num_quarantined),
                    each.answer,
                    each.waits_for,
                )
                for each in store.members
            ],
        )
    if store.oldest_handoffs:
        yield Table(
            "",
            ("handoff", "request", "state", "age", "holder", "final", "granted", "waits for"),
            [
                (
                    each.handoff_id,
                    each.request_id,
                    each.state,
                    "" if each.age_s is None else f"{each.age_s:.3f} s",
                    each.holder,
                    str(each.num_committed),
                    str(each.num_granted),
                    each.waits_for,
                )
                for each in store.oldest_handoffs
            ],
        )
    for warning in store.warnings:
        yield f"warning: {warning}"
    for discrepancy in store.discrepancies:
        yield f"discrepancy: {discrepancy}"


def why_parts(told: Told) -> Iterator[Part]:
    """What every store remembers, oldest first."""
    for store in told.stores:
        yield from _history_parts(store)


def _history_parts(store: StoreHistory) -> Iterator[Part]:
    title = f"KV store {store.store} at {store.endpoint}"
    if store.problem:
        yield f"{title}: {store.problem}"
        return
    if store.events:
        head = ("age", "event", "by", "handoff", "request", "blocks", "")
        yield Table(title, head, [_event_row(event) for event in store.events])
    else:
        yield f"{title}: nothing is remembered of it"
    if store.now:
        yield f"now: {store.now}"
    if store.num_cut:
        yield f"{store.num_cut} older events are not shown"
    if store.num_forgotten:
        yield f"the store has forgotten its {store.num_forgotten} oldest events"


def _event_row(event: HistoryEvent) -> tuple[str, ...]:
    blocks = " ".join(f"{block}({stamp})" for block, stamp in event.blocks)
    if event.num_blocks > len(event.blocks):
        blocks += f" and {event.num_blocks - len(event.blocks)} more"
    return (
        f"{event.age_s:.3f} s",
        event.event.replace("_", " "),
        event.member,
        event.handoff_id,
        event.request_id,
        blocks,
        event.detail,
    )


def plain_lines(parts: Iterable[Part]) -> Iterator[str]:
    """The parts as aligned text."""
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        if part.title:
            yield part.title
        rows = [part.head, *part.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  " + _aligned(row, widths)
        yield ""


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def draw(parts: Iterable[Part]) -> bool:
    """Draw the parts on the terminal. False, without having drawn any, if rich is missing."""
    try:
        from rich.console import Console
    except ImportError:
        return False
    console = Console(highlight=False)
    for each in renderables(parts):
        console.print(each)
    return True


def renderables(parts: Iterable[Part]) -> Iterator[RenderableType]:
    """The parts as rich draws them."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    for part in parts:
        if isinstance(part, str):
            yield Text(part)
            continue
        if part.title:
            yield Text(part.title, style="bold")
        grid = Grid(box=box.SIMPLE)
        for name in part.head:
            grid.add_column(Text(name), overflow="fold")
        for row in part.rows:
            grid.add_row(*map(Text, row))
        yield grid
