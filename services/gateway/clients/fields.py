"""A msgpack message as the HTTP face knows it: what both have is checked by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import MAX_DEADLINE_MS, Generate
from kvbaton.questions import Tokenize
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.schema import ChatRequest

# Of the same name, type and meaning at both.
_SHARED = (
    "add_generation_prompt", "add_special_tokens", "best_of", "chat_template_kwargs",
    "continue_final_message", "messages", "n", "priority", "response_format", "session_id",
    "structured_outputs", "tool_choice", "tools", "truncate_prompt_tokens",
)  # fmt: skip


def http_fields(message: Generate | Tokenize) -> ChatRequest:
    """The fields that a chat request would have. Raises InvalidRequestError."""
    own = [name for name in _SHARED if name in message.__struct_fields__]
    values = {name: getattr(message, name) for name in own}
    raw: dict[str, Any] = {name: _json(value, name) for name, value in values.items()}
    if message.messages is None:
        raw["messages"] = msgspec.Raw(b"[]")
    fields = decode(msgspec.json.encode(raw), ChatRequest)
    if isinstance(message, Tokenize):
        return fields
    return msgspec.structs.replace(  # JSON has no NaN
        fields, ttft_target_ms=message.ttft_target_ms, tpot_target_ms=message.tpot_target_ms
    )


def _json(value: Any, field: str) -> msgspec.Raw:
    try:
        return msgspec.Raw(msgspec.json.encode(value))
    except RecursionError as error:
        raise InvalidRequestError(f"{field} is nested too deeply", field=field) from error


def check_given(message: Any, names: Sequence[str]) -> str:
    """The one of these fields that is given. Raises InvalidRequestError unless it is just one."""
    given = [name for name in names if getattr(message, name) is not None]
    if len(given) != 1:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise InvalidRequestError(
            f"exactly one of {listed} is given, got {given or 'none'}",
            field=given[1] if given else names[0],
        )
    return given[0]


def check_deadline(deadline_ms: int | None) -> None:
    """Raise InvalidRequestError (deadline_ms) for one that is out of range."""
    if deadline_ms is not None and not 1 <= deadline_ms <= MAX_DEADLINE_MS:
        raise InvalidRequestError(
            f"deadline_ms must be at least 1 and at most {MAX_DEADLINE_MS}, got {deadline_ms}",
            field="deadline_ms",
        )
