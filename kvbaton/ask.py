"""An operator's questions to a gateway, one at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeVar

from kvbaton.codec import encode
from kvbaton.errors import ConnectionLostError, KvbatonError, ProtocolError
from kvbaton.gateways import Gateways
from kvbaton.keys import ADMIN, client_curve
from kvbaton.protocol import PING_INTERVAL_S, Audit, Audited, Told, Why
from kvbaton.session import Event

T = TypeVar("T", Audited, Told)
Keys = Path | str | None  # admin.key or the folder that it is in, as for a client

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 15.0
_ID = 1


def audit(endpoint: str, admin_key: str, keys: Keys = None) -> Audited:
    """Whether the books of every KV store close. Raises KvbatonError if that cannot be told."""
    return asyncio.run(_ask(endpoint, keys, Audit(id=_ID, admin_key=admin_key), Audited))


def why_block(
    endpoint: str, admin_key: str, block: int, store: int | None = None, keys: Keys = None
) -> Told:
    """What happened to a block; `store` is needed where there are several. Raises KvbatonError."""
    question = Why(id=_ID, admin_key=admin_key, block=block, store=store)
    return asyncio.run(_ask(endpoint, keys, question, Told))


def why_request(endpoint: str, admin_key: str, name: str, keys: Keys = None) -> Told:
    """What happened to a request or handoff, by any id that was seen of it. Raises KvbatonError."""
    return asyncio.run(_ask(endpoint, keys, Why(id=_ID, admin_key=admin_key, name=name), Told))


async def _ask(endpoint: str, keys: Keys, question: Audit | Why, kind: type[T]) -> T:
    gateways = Gateways(
        endpoint,
        curve=client_curve(keys, ADMIN),
        connect_timeout_s=_CONNECT_TIMEOUT_S,
        ping_interval_s=PING_INTERVAL_S,
        resume_s=0,
    )
    answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def sink(event: Event) -> None:
        if not answer.done():
            answer.set_result(event)

    try:
        await gateways.connect()
        gateways.ask(_ID, encode(question), sink)
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            event = await answer
    except TimeoutError as error:
        raise ConnectionLostError(
            f"no answer from {endpoint} within {_ANSWER_TIMEOUT_S:g} s"
        ) from error
    finally:
        gateways.close()
    if isinstance(event, KvbatonError):
        raise event
    if not isinstance(event, kind):
        raise ProtocolError("the gateway answered what was not asked")
    return event
