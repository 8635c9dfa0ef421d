"""An operator's questions for plain programs: each is a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from kvbaton.operations import Standing
from kvbaton.operator import Operator
from kvbaton.protocol import Audited, Told

T = TypeVar("T")
Keys = Path | str | None  # admin.key or the folder that it is in, as for a client


def audit(endpoint: str, admin_key: str, keys: Keys = None) -> Audited:
    """Whether the books of every KV store close. Raises KvbatonError if that cannot be told."""
    return asyncio.run(_once(Operator(endpoint, admin_key, keys), Operator.audit))


def status(endpoint: str, admin_key: str, keys: Keys = None) -> Standing:
    """Who is there, and how much there is to do. Raises KvbatonError."""
    return asyncio.run(_once(Operator(endpoint, admin_key, keys), Operator.status))


def why_block(
    endpoint: str, admin_key: str, block: int, store: int | None = None, keys: Keys = None
) -> Told:
    """What happened to a block; `store` is needed where there are several. Raises KvbatonError."""
    operator = Operator(endpoint, admin_key, keys)
    return asyncio.run(_once(operator, lambda each: each.why(block=block, store=store)))


def why_request(endpoint: str, admin_key: str, name: str, keys: Keys = None) -> Told:
    """What happened to a request or handoff, by any id that was seen of it. Raises KvbatonError."""
    return asyncio.run(_once(Operator(endpoint, admin_key, keys), lambda each: each.why(name=name)))


async def _once(operator: Operator, question: Callable[[Operator], Awaitable[T]]) -> T:
    async with operator:
        return await question(operator)
