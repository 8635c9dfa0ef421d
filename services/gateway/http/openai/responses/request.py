"""What /v1/responses takes, told as the chat request that it comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.schema import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    GenerationFields,
    Unread,
)
from services.gateway.http.openai.structured import given

MAX_ITEMS = 4096

_TEXTS = ("input_text", "output_text", "text")
_ROLES = {"developer": "system"}  # templates know but one of the two
# A chat request's fields by their names here.
_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
_CHAT_FIELD = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in _FIELDS))


class TextFormat(msgspec.Struct, frozen=True):
    """What the text must look like. `type`: text, json_object or json_schema."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Unread = msgspec.UNSET
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct, frozen=True):
    type: str
    name: str = ""


class Item(msgspec.Struct, frozen=True):
    """A message, a call of a function or what it gave."""

    type: str = "message"
    role: str = ""
    content: str | list[ContentPart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[ContentPart] | None = None


class ResponsesRequest(GenerationFields, kw_only=True, frozen=True):
    """POST /v1/responses. `input`: a text, or a list of items."""

    input: msgspec.Raw
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Unread = msgspec.UNSET
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Unread = msgspec.UNSET
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Unread = msgspec.UNSET
    prompt: Unread = msgspec.UNSET
    background: bool | None = None
    truncation: str | None = None


def to_chat(fields: ResponsesRequest) -> ChatRequest:
    """The chat request with the same answer. Raises InvalidRequestError."""
    _refuse_memory(fields)
    common = {name: getattr(fields, name) for name in GenerationFields.__struct_fields__}
    common |= {"n": 1, "best_of": None, "max_tokens": None, "stream_options": None}
    common["max_completion_tokens"] = fields.max_output_tokens
    wish = fields.text and fields.text.format
    if wish:
        common["response_format"] = _raw(_response_format(wish))
    return ChatRequest(
        **common,
        messages=list(_messages(fields)),
        tools=_raw(list(_tools(fields.tools))) if fields.tools else msgspec.UNSET,
        tool_choice=_tool_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls,
        chat_template_kwargs=fields.chat_template_kwargs,
    )


def as_responses_error(error: InvalidRequestError) -> InvalidRequestError:
    """The error of a chat request in this endpoint's words."""

    def renamed(text: str) -> str:
        return _CHAT_FIELD.sub(lambda found: _FIELDS[found[0]], text)

    return InvalidRequestError(renamed(error.message), field=renamed(error.field or "") or None)


def _refuse_memory(fields: ResponsesRequest) -> None:
    """What needs a server that keeps something."""
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        value = getattr(fields, name)
        if isinstance(value, msgspec.Raw):
            value = given(value)
        if value and value is not msgspec.UNSET:
            raise InvalidRequestError(
                f"{name} is not supported: this server keeps no responses, send the whole "
                "conversation as input",
                field=name,
            )


def _messages(fields: ResponsesRequest) -> Iterator[ChatMessage]:
    if fields.instructions is not None:
        yield ChatMessage("system", fields.instructions)
    if bytes(fields.input).startswith(b'"'):
        yield ChatMessage("user", decode(fields.input, str, "input"))
        return
    items = decode(fields.input, list[Item], "input")
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InvalidRequestError(
            f"input holds 1 to {MAX_ITEMS} items, got {len(items)}", field="input"
        )
    calls: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        if item.type == "function_call":
            calls.append(_call(item))
            continue
        if calls:
            yield _calling(calls)
            calls = []
        if item.type == "message":
            role = _ROLES.get(item.role, item.role)
            yield ChatMessage(role, _texts(item.content, f"input[{index}].content"))
        elif item.type == "function_call_output":
            content = _texts(item.output, f"input[{index}].output")
            yield ChatMessage("tool", content, tool_call_id=_raw(item.call_id))
        elif item.type != "reasoning":
            raise InvalidRequestError(
                f"input[{index}].type must be message, function_call or function_call_output, got "
                f"{item.type[:64]!r}",
                field=f"input[{index}].type",
            )
    if calls:
        yield _calling(calls)


def _call(item: Item) -> dict[str, Any]:
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _calling(calls: list[dict[str, Any]]) -> ChatMessage:
    return ChatMessage("assistant", None, tool_calls=_raw(calls))


def _texts(content: str | list[ContentPart] | None, where: str) -> str | list[ContentPart] | None:
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if part.type not in _TEXTS:
            raise InvalidRequestError(
                f"{where}[{index}].type must be input_text or output_text, other types are not "
                "supported yet",
                field=f"{where}[{index}].type",
            )
    return [ContentPart("text", part.text) for part in content]


def _response_format(wish: TextFormat) -> dict[str, Any]:
    if wish.type != "json_schema":
        return {"type": wish.type}
    schema = {"name": wish.name, "schema": wish.schema, "strict": wish.strict}
    kept = {name: value for name, value in schema.items() if value is not msgspec.UNSET}
    return {"type": wish.type, "json_schema": kept}


def _tools(tools: list[FunctionTool]) -> Iterator[dict[str, Any]]:
    for tool in tools:
        function = msgspec.structs.asdict(tool)
        yield {"type": function.pop("type"), "function": function}


def _tool_choice(raw: Unread) -> Unread:
    found = given(raw)
    if found is None or not bytes(found).startswith(b"{"):
        return raw
    named = decode(found, NamedFunction, "tool_choice")
    return _raw({"type": named.type, "function": {"name": named.name}})


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
