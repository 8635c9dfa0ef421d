"""A question to a KV store, as an operator's command puts it."""

from __future__ import annotations

from typing import TypeVar

from common.messages import Message
from kvbaton.errors import KvbatonError
from services.gateway.routing.peers import Store

M = TypeVar("M", bound=Message)

ANSWER_TIMEOUT_S = 5.0


async def ask(store: Store, message: Message, kind: type[M]) -> M:
    """The store's answer. Raises KvbatonError, also where it cannot be reached."""
    if not store.is_up:
        raise KvbatonError("it cannot be reached")
    answer = await store.link.call(message, timeout_s=ANSWER_TIMEOUT_S)
    assert isinstance(answer, kind)
    return answer
