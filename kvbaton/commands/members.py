"""`status`, `drain` and `log-level`: who is there, and what they are told to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from kvbaton.commands.options import operator_of, show
from kvbaton.operations import LogLevelSet, MemberStatus, Standing, StoreStatus
from kvbaton.tables import Part, Table

_SHOWN_ID_CHARS = 8  # as many as a member can be known by
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


async def status(options: argparse.Namespace) -> int:
    """Returns 0, or 1 if a KV store could not be asked."""
    async with operator_of(options) as operator:
        standing = await operator.status()
    show(standing, status_parts(standing), as_json=options.json)
    return 1 if any(store.problem for store in standing.stores) else 0


async def drain(options: argparse.Namespace) -> int:
    """Returns 0 when the worker holds nothing any more."""
    async with operator_of(options) as operator:
        if not options.json:
            print(f"draining {options.member} ...", file=sys.stderr)
        drained = await operator.drain(
            options.member, force=options.force, timeout_s=options.timeout
        )
    said = f"{drained.name} is drained: it holds nothing and takes nothing until it is restarted"
    show(drained, [said], as_json=options.json)
    return 0


async def log_level(options: argparse.Namespace) -> int:
    """Returns 0, or 1 if somebody who was meant could not be told."""
    async with operator_of(options) as operator:
        answer = await operator.set_log_level(options.member, options.level)
    show(answer, _log_level_parts(answer, options.level), as_json=options.json)
    return 1 if answer.problems else 0


def status_parts(standing: Standing) -> Iterator[Part]:
    """The members, then the stores."""
    about = f"{standing.model}, as {standing.gateway} knows it (version {standing.version})"
    head = ("member", "role", "state", "running", "waiting", "places", "queued", "tok/s")
    rows = [_member_row(each) for each in standing.members]
    yield Table(about, (*head, "age", "version", "id"), rows)
    for store in standing.stores:
        if store.problem:
            yield f"KV store {store.store} at {store.endpoint}: {store.problem}"
    known = [store for store in standing.stores if not store.problem]
    if known:
        states = list(dict.fromkeys(state for store in known for state in store.blocks))
        columns = (
            "KV store",
            "endpoint",
            "blocks",
            *states,
            "handoffs",
            "waiting",
            "age",
            "version",
        )
        yield Table("", columns, [_store_row(store, states) for store in known])


def _member_row(member: MemberStatus) -> tuple[str, ...]:
    is_worker = member.role != "gateway"
    return (
        member.name,
        member.role,
        member.state,
        str(member.num_running),
        str(member.num_waiting),
        str(member.num_places) if is_worker else "",
        str(member.num_tokens_queued) if is_worker else "",
        f"{member.tokens_per_s:.0f}" if is_worker else "",
        _age(member.age_s),
        member.version,
        member.member_id[:_SHOWN_ID_CHARS],
    )


def _store_row(store: StoreStatus, states: list[str]) -> tuple[str, ...]:
    return (
        store.name,
        store.endpoint,
        str(store.num_blocks),
        *(str(store.blocks.get(state, 0)) for state in states),
        str(sum(store.handoffs.values())),
        str(store.num_waiting),
        _age(store.age_s),
        store.version,
    )


def _age(age_s: float | None) -> str:
    """In the two units that matter."""
    if age_s is None:
        return ""
    seconds = int(age_s)
    if seconds < _MINUTE_S:
        return f"{seconds} s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S} min {seconds % _MINUTE_S} s"
    if seconds < _DAY_S:
        return f"{seconds // _HOUR_S} h {seconds % _HOUR_S // _MINUTE_S} min"
    return f"{seconds // _DAY_S} d {seconds % _DAY_S // _HOUR_S} h"


def _log_level_parts(answer: LogLevelSet, level: str) -> Iterator[Part]:
    if answer.names:
        yield f"level {level}: {', '.join(answer.names)}"
    for name, problem in answer.problems.items():
        yield f"{name} could not be told: {problem}"
