"""What a request says of tools, and what earlier turns said with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.grammars import compile_source
from services.gateway.http.openai.prompts import parse_messages
from services.gateway.http.openai.schema import ChatRequest
from services.gateway.http.openai.tools.heard import CallPiece, Piece
from services.gateway.http.openai.tools.request import ToolUse, parse_tools, wanted_structure
from tests.unit.gateway_fakes import DEMO, EOS


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


LOOK = tool(
    "look",
    description="Looks something up.",
    parameters={
        "type": "object",
        "properties": {"word": {"$ref": "#/$defs/word"}},
        "required": ["word"],
        "$defs": {"word": {"type": "string"}},
    },
)
STOP = tool("stop-it")


def chat(**fields: Any) -> ChatRequest:
    return decode(json.dumps({"messages": [], **fields}).encode(), ChatRequest)


def use(**fields: Any) -> ToolUse:
    found = parse_tools(chat(**{"tools": [LOOK, STOP], **fields}), "hermes")
    assert found is not None
    return found


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": None, "tool_choice": None},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": [LOOK], "tool_choice": "none"},
    ],
)
def test_no_call_can_come_of_it(fields: dict[str, Any]) -> None:
    assert parse_tools(chat(**fields), "hermes") is None


def test_templates_get_the_tools_as_they_were_given() -> None:
    assert use().for_template() == [LOOK, STOP]
    assert use().choice == "auto"
    assert use().source() is None


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"tools": 5}, "tools", "expected `array`"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{**LOOK, "type": "web_search"}]}, "tools[0].type", "must be function"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "letters"),
        ({"tools": [LOOK, LOOK]}, "tools[1].function.name", "of its own"),
        ({"tools": [tool(f"t{n}") for n in range(129)]}, "tools", "at most 128"),
        ({"tools": [tool("x", description="y" * 200_000)]}, "tools", "bytes"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [LOOK], "tool_choice": "perhaps"}, "tool_choice", "'perhaps'"),
        ({"tools": [LOOK], "tool_choice": named("stop")}, "tool_choice", "not among"),
        ({"tools": [LOOK], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        ({"tools": [LOOK], "tool_choice": 5}, "tool_choice", "expected `str`"),
    ],
)
def test_wrong_tools_are_refused_by_field(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        parse_tools(chat(**fields), "hermes")
    assert error.value.field == field


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((DEMO / "tokenizer.json").read_text(), eos_token=EOS)


def accepts(tokenizer: LLTokenizer, wish: ToolUse, text: str) -> bool:
    source = wish.source()
    assert source is not None
    matcher = LLMatcher(tokenizer, compile_source(source))
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


LOOKING = '{"name":"look","parameters":{"word":"x"}}'
STOPPING = '{"name":"stop-it","parameters":{}}'


def test_a_required_call_is_one_of_the_tools(tokenizer: LLTokenizer) -> None:
    wish = use(tool_choice="required")
    assert accepts(tokenizer, wish, f"[{LOOKING}]")
    assert accepts(tokenizer, wish, f"[{LOOKING},{STOPPING}]")
    assert not accepts(tokenizer, wish, "[]")
    assert not accepts(tokenizer, wish, '[{"name":"look","parameters":{}}]')
    assert not accepts(tokenizer, wish, '[{"name":"other","parameters":{}}]')


def test_calls_are_single_unless_parallel(tokenizer: LLTokenizer) -> None:
    wish = use(tool_choice="required", parallel_tool_calls=False)
    assert accepts(tokenizer, wish, f"[{STOPPING}]")
    assert not accepts(tokenizer, wish, f"[{STOPPING},{STOPPING}]")


def test_a_named_call_is_its_arguments(tokenizer: LLTokenizer) -> None:
    wish = use(tool_choice=named("look"))
    assert accepts(tokenizer, wish, '{"word":"x"}')
    assert not accepts(tokenizer, wish, "{}")


def test_a_forced_call_contradicts_another_form() -> None:
    fields = chat(tools=[LOOK], tool_choice="required", response_format={"type": "json_object"})
    with pytest.raises(InvalidRequestError, match="tool_choice") as error:
        wanted_structure(fields, parse_tools(fields, "hermes"))
    assert error.value.field == "response_format"
    free = chat(tools=[LOOK], response_format={"type": "json_object"})
    assert wanted_structure(free, parse_tools(free, "hermes")) is not None


def test_tokens_that_announce_calls_are_shown_where_they_are_special() -> None:
    for layout, is_special in (("hermes", False), ("llama3", True), ("mistral", True)):
        free = parse_tools(chat(tools=[LOOK]), layout)
        forced = parse_tools(chat(tools=[LOOK], tool_choice="required"), layout)
        assert free is not None
        assert forced is not None
        assert free.shows_special_tokens is is_special
        assert not forced.shows_special_tokens


def test_earlier_calls_reach_the_template_with_arguments_as_objects() -> None:
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"function": {"name": "g", "arguments": "broken"}},
        {"function": {"name": "h", "arguments": ""}},
    ]
    messages = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert parse_messages(chat(messages=messages).messages) == [
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": {"x": 1}},
                },
                {"type": "function", "function": {"name": "g", "arguments": "broken"}},
                {"type": "function", "function": {"name": "h", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
    ]


def test_ids_of_calls_are_the_same_for_the_same_answer() -> None:
    text = f"[{LOOKING},{STOPPING}]"
    wish = use(tool_choice="required")
    first, again, other = (wish.heard(base) for base in ("a/0", "a/0", "a/1"))
    piece = first.add(text, is_last=True)
    ids = [call.id for call in piece.calls]
    assert piece == Piece("", [
        CallPiece(0, ids[0], "look", '{"word":"x"}'), CallPiece(1, ids[1], "stop-it", "{}")
    ])  # fmt: skip
    assert first.num_calls == 2
    assert again.add(text, is_last=True) == piece
    assert len({*ids, *(call.id for call in other.add(text, is_last=True).calls)}) == 4
    assert all(each.startswith("call_") and len(each) == 29 for each in ids)


def test_ids_are_short_where_templates_want_them_so() -> None:
    wish = parse_tools(chat(tools=[STOP], tool_choice="required"), "mistral")
    assert wish is not None
    piece = wish.heard("a").add(f"[{STOPPING}]", is_last=True)
    assert len(piece.calls[0].id) == 9


def test_only_the_first_call_is_told_of_unless_they_are_parallel() -> None:
    text = "".join(f"<tool_call>{each}</tool_call>" for each in (LOOKING, STOPPING))
    heard = use(parallel_tool_calls=False).heard("a")
    pieces = [heard.add(text[:80], is_last=False), heard.add(text[80:], is_last=True)]
    assert [call.name for piece in pieces for call in piece.calls if call.name] == ["look"]
    arguments = "".join(call.arguments for piece in pieces for call in piece.calls)
    assert arguments == '{"word":"x"}'
    assert len(use().heard("a").add(text, is_last=True).calls) == 2
