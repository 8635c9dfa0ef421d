"""What a chat request tells the model's template besides its messages."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.schema import ChatRequest, Unread

MAX_KWARGS_BYTES = 64 * 1024
MAX_DOCUMENTS_BYTES = 1024 * 1024

# Fields of their own, or the model's own: a second value would contradict.
_RESERVED = frozenset({
    "add_generation_prompt", "add_special_tokens", "bos_token", "chat_template",
    "continue_final_message", "continues", "documents", "eos_token", "is_end_enough", "messages",
    "most_tokens", "pad_token", "tokenize", "tools", "unk_token",
})  # fmt: skip

T = TypeVar("T")


def template_options(fields: ChatRequest) -> dict[str, Any]:
    """Values by name. Raises InvalidRequestError."""
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true",
            field="continue_final_message",
        )
    options = _read(
        fields.chat_template_kwargs, "chat_template_kwargs", dict[str, Any], MAX_KWARGS_BYTES
    )
    options = options or {}
    for name in sorted(options.keys() & _RESERVED):
        raise InvalidRequestError(
            f"chat_template_kwargs must not have {name}, which the server gives by other ways",
            field=f"chat_template_kwargs.{name}",
        )
    documents = _read(fields.documents, "documents", list[dict[str, Any]], MAX_DOCUMENTS_BYTES)
    if documents:
        options["documents"] = documents
    if fields.reasoning_effort is not None:
        options.setdefault("reasoning_effort", fields.reasoning_effort)
    wants_prompt = fields.add_generation_prompt is not False and not continues
    return options | {"add_generation_prompt": wants_prompt}


def _read(raw: Unread, field: str, kind: type[T], most_bytes: int) -> T | None:
    """The value of a field, None if there is none. Raises InvalidRequestError."""
    if isinstance(raw, msgspec.UnsetType):
        return None
    if len(raw) > most_bytes:
        raise InvalidRequestError(
            f"{field} has at most {most_bytes} bytes, got {len(raw)}", field=field
        )
    if bytes(raw) == b"null":
        return None
    return decode(raw, kind, field)
