"""Conversations, by the names that OpenAI's API gives to their parts."""

from __future__ import annotations

import msgspec


class FunctionCall(msgspec.Struct, kw_only=True, frozen=True):
    """The function that the model calls. `arguments` is the text that it wrote: JSON, mostly."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, kw_only=True, frozen=True):
    """One call of a tool. The answer to it is a message of the role `tool` that names its `id`."""

    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One turn of a conversation. Only one with `tool_calls` may be without `content`."""

    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
