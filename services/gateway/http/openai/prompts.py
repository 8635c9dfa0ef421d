"""What a request is about: its prompts, or its conversation."""

from __future__ import annotations

from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.params import MAX_CHOICES, too_many_choices
from services.gateway.http.openai.schema import ChatMessage
from services.gateway.http.openai.structured import given
from services.gateway.http.openai.tools.messages import parse_calls

MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 4096  # of all messages together


def parse_prompts(raw: msgspec.Raw) -> list[str] | list[list[int]]:
    """The prompts of a completion request, at most MAX_CHOICES of them."""
    text = bytes(raw)
    first = text[1:].lstrip()[:1]
    prompts: list[str] | list[list[int]]
    if not text.startswith(b"["):
        prompts = [decode(raw, str, "prompt")]
    elif first == b'"':
        prompts = decode(raw, list[str], "prompt")
    elif first == b"[":
        # Counted before they are built: millions of tiny lists would stall the event loop.
        if text.count(b"[") > MAX_CHOICES + 1:
            raise too_many_choices(text.count(b"[") - 1)
        prompts = decode(raw, list[list[int]], "prompt")
    else:
        prompts = [decode(raw, list[int], "prompt")]
    if not prompts or not all(prompts):
        raise InvalidRequestError("prompt is empty", field="prompt")
    return prompts


def parse_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it: content as one text, absent keys left out."""
    if not messages:
        raise InvalidRequestError("messages is empty", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages holds at most {MAX_MESSAGES} messages, got {len(messages)}", field="messages"
        )
    parts = [message.content for message in messages if isinstance(message.content, list)]
    if sum(map(len, parts)) > MAX_CONTENT_PARTS:
        raise InvalidRequestError(
            f"messages hold at most {MAX_CONTENT_PARTS} content parts, got {sum(map(len, parts))}",
            field="messages",
        )
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _parse_message(message: ChatMessage, where: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    "a content part must have type text and a text, other types are not "
                    "supported yet",
                    field=f"{where}.content[{index}]",
                )
        content = "\n".join(part.text or "" for part in content)
    calls, call_id = given(message.tool_calls), given(message.tool_call_id)
    values = {
        "role": message.role,
        "content": content,
        "name": message.name,
        "tool_calls": calls and parse_calls(calls, f"{where}.tool_calls"),
        "tool_call_id": call_id and decode(call_id, str, f"{where}.tool_call_id"),
    }
    return {name: value for name, value in values.items() if value is not None}


def truncated(
    prompt: list[int], most: int | None, max_tokens: int | None, max_model_len: int | None
) -> list[int]:
    """The last tokens of a prompt, at most `most`; -1 for what leaves room for the output."""
    if most is None:
        return prompt
    if most < -1 or most == 0:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or at least 1, got {most}",
            field="truncate_prompt_tokens",
        )
    if most == -1:
        if max_model_len is None:
            return prompt
        most = max(1, max_model_len - (max_tokens or 1))
    return prompt[-most:]
