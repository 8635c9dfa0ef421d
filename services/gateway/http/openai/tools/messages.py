"""The calls of earlier turns, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from services.gateway.http.openai.decoding import decode


class PastFunction(msgspec.Struct, frozen=True):
    """`arguments`: JSON as a text, as OpenAI has it; an object is taken too."""

    name: str
    arguments: str | dict[str, Any] | None = None


class PastCall(msgspec.Struct, frozen=True):
    """A call in a message of the assistant."""

    function: PastFunction
    id: str | None = None
    type: str = "function"


def parse_calls(raw: msgspec.Raw, where: str) -> list[dict[str, Any]]:
    """The calls; templates want arguments as objects. Text that is no object stays text: the model
    wrote it so, and may be told by its tool. Raises InvalidRequestError."""
    calls = decode(raw, list[PastCall], where)
    return [
        {
            **({} if call.id is None else {"id": call.id}),
            "type": call.type,
            "function": {
                "name": call.function.name,
                "arguments": _arguments(call.function.arguments),
            },
        }
        for call in calls
    ]


def _arguments(given: str | dict[str, Any] | None) -> Any:
    if not isinstance(given, str):
        return given or {}
    try:
        value = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given
