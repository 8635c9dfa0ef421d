"""What a request says of tools: which there are, whether one must be called, and in what form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.grammars import JsonOptions, Source, embedded_schema
from services.gateway.http.openai.schema import ChatRequest, GenerationFields
from services.gateway.http.openai.structured import MAX_DEPTH, bounded, given, parse_structure
from services.gateway.http.openai.tools.calls import MAX_NAME_CHARS
from services.gateway.http.openai.tools.events import Parser
from services.gateway.http.openai.tools.formats import ARRAY, FORMATS, ForcedCall, FormatParser
from services.gateway.http.openai.tools.heard import Heard

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 192 * 1024  # their grammar is somewhat longer
MAX_FORCED_CALLS = 16

_NAME = re.compile(rf"[a-zA-Z0-9_.:/-]{{1,{MAX_NAME_CHARS}}}")
_CHOICES = ("auto", "none", "required")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionSpec(msgspec.Struct, frozen=True):
    """A function that a model may call; `parameters` is a JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool; only functions are."""

    type: str
    function: FunctionSpec


class FunctionName(msgspec.Struct, frozen=True):
    name: str


class NamedChoice(msgspec.Struct, frozen=True):
    """A tool_choice that names the function to call."""

    type: str
    function: FunctionName


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request. `choice`: auto, required, or in `named` the one to call.

    `layout` names the format in which the model writes calls of its own accord.
    """

    tools: tuple[ToolSpec, ...]
    choice: str
    named: str
    is_parallel: bool
    layout: str

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def shows_special_tokens(self) -> bool:
        """Whether the model's own calls begin with a token that answers do not show otherwise."""
        return self.choice == "auto" and FORMATS[self.layout].marker_is_special

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        shown: list[dict[str, Any]] = list(msgspec.to_builtins(self.tools))
        for tool in shown:
            function = tool["function"]
            tool["function"] = {key: part for key, part in function.items() if part is not None}
        return shown

    def parser(self) -> Parser:
        """What finds the calls in an answer."""
        if self.named:
            return ForcedCall(self.named)
        return FormatParser(
            ARRAY if self.choice == "required" else FORMATS[self.layout], self.names
        )

    def heard(self, id_base: str) -> Heard:
        """A fresh reader of one answer; see Heard for `id_base`."""
        return Heard(
            self.parser(),
            id_base,
            has_short_ids=self.layout == "mistral",
            is_single=not self.is_parallel,
        )

    def source(self) -> Source | None:
        """The grammar that forces a call; None where the model is free."""
        if self.named:
            (tool,) = (tool for tool in self.tools if tool.function.name == self.named)
            schema = json.dumps(_schema(tool), ensure_ascii=False)
            return Source("tools", "json", schema, _options(tool))
        if self.choice != "required":
            return None
        return Source("tools", "lark", self._array_of_calls())

    def _array_of_calls(self) -> str:
        """[{"name": ..., "parameters": {...}}, ...]. In Lark, so that each schema is a whole
        document, in which references are found."""
        more = f'("," call){{0,{MAX_FORCED_CALLS - 1}}} ' if self.is_parallel else ""
        numbers = range(len(self.tools))
        rules = [
            "%llguidance {}",
            f'start: "[" call {more}"]"',
            "call: " + " | ".join(f"call_{number}" for number in numbers),
        ]
        for number, tool in enumerate(self.tools):
            head = json.dumps(f'{{"name":{json.dumps(tool.function.name)},"parameters":')
            rules.append(f'call_{number}: {head} arguments_{number} "}}"')
            rules.append(f"arguments_{number}: {embedded_schema(_schema(tool), _options(tool))}")
        return "\n".join(rules) + "\n"


def wanted_structure(fields: GenerationFields, tools: ToolUse | None) -> Source | None:
    """What the answer must look like: as its client says, or as the call that it forces.

    Raises InvalidRequestError for two wishes at once.
    """
    wish = parse_structure(fields)
    forced = None if tools is None else tools.source()
    if wish is not None and forced is not None:
        raise InvalidRequestError(
            f"{wish.field} contradicts tool_choice, which forces a call", field=wish.field
        )
    return wish or forced


def parse_tools(fields: ChatRequest, layout: str) -> ToolUse | None:
    """What the request says of tools; None if no call can come of it.

    `layout` is the model's own format of calls. Raises InvalidRequestError.
    """
    raw = given(fields.tools)
    tools = () if raw is None else _tools(raw)
    choice, named = _choice(fields)
    if not tools:
        if choice == "required" or named:
            raise InvalidRequestError("tool_choice needs tools", field="tool_choice")
        return None
    if choice == "none":
        return None
    is_parallel = fields.parallel_tool_calls is not False
    use = ToolUse(tools, choice, named, is_parallel, layout)
    if named and named not in use.names:
        raise InvalidRequestError(
            f"tool_choice names {named[:MAX_NAME_CHARS]!r}, which is not among the tools",
            field="tool_choice",
        )
    return use


def _tools(raw: msgspec.Raw) -> tuple[ToolSpec, ...]:
    bounded(raw, "tools", depth=MAX_DEPTH + 4, most_bytes=MAX_TOOLS_BYTES)
    tools = decode(raw, list[ToolSpec], "tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools holds at most {MAX_TOOLS}, got {len(tools)}", field="tools"
        )
    seen = set()
    for index, tool in enumerate(tools):
        where, name = f"tools[{index}]", tool.function.name
        if tool.type != "function":
            raise InvalidRequestError(f"{where}.type must be function", field=f"{where}.type")
        if not _NAME.fullmatch(name) or name in seen:
            raise InvalidRequestError(
                f"{where}.function.name must be a name of its own of 1 to {MAX_NAME_CHARS} "
                "letters, digits and any of _ . : / -",
                field=f"{where}.function.name",
            )
        seen.add(name)
    return tuple(tools)


def _choice(fields: ChatRequest) -> tuple[str, str]:
    """One of the words, and the name of the function to call, if one is named."""
    raw = given(fields.tool_choice)
    if raw is None:
        return "auto", ""
    if bytes(raw).startswith(b"{"):
        named = decode(raw, NamedChoice, "tool_choice")
        if named.type != "function" or not named.function.name:
            raise InvalidRequestError("tool_choice must name a function", field="tool_choice")
        return "named", named.function.name
    word = decode(raw, str, "tool_choice")
    if word not in _CHOICES:
        raise InvalidRequestError(
            f"tool_choice must be auto, none, required or name a function, got {word[:64]!r}",
            field="tool_choice",
        )
    return word, ""


def _schema(tool: ToolSpec) -> dict[str, Any]:
    """The arguments' schema: an object's, whatever else it says."""
    return {"type": "object", **(tool.function.parameters or _NO_ARGUMENTS)}


def _options(tool: ToolSpec) -> JsonOptions:
    """Schemas of tools say much that is only meant for people."""
    return JsonOptions(lenient=tool.function.strict is not True)
