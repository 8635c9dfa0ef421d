"""Calls of tools found in the text of an answer, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.http.openai.tools.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Parser,
    merged,
)
from services.gateway.http.openai.tools.formats import (
    ARRAY,
    FORMATS,
    ForcedCall,
    FormatParser,
    PlainText,
    detect_format,
)

NAMES = frozenset({"f", "g"})
LAYOUTS = {**FORMATS, "array": ARRAY}


def parsed(parser: Parser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged(events + parser.finish())


def heard(layout: str, text: str) -> list[Event]:
    return parsed(FormatParser(LAYOUTS[layout], NAMES), [text])


def call(name: str, arguments: str) -> list[Event]:
    return [CallStart(name), CallArguments(arguments)]


TAIL = [Content("t")]


@pytest.mark.parametrize(
    ("layout", "text", "events"),
    [
        ("hermes", "no call", [Content("no call")]),
        (
            "hermes",
            'a <tool_call>\n{"name": "f", "arguments": {"x": ["}", "\\"{"]}}\n</tool_call>',
            [Content("a "), *call("f", '{"x": ["}", "\\"{"]}')],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>\n'
            '<tool_call>{"id": 7, "name": "g", "parameters": {}}</tool_call>\n',
            [*call("f", '{"x": 1}'), *call("g", "{}")],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> t', [*call("f", "{}"), Content(" t")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
            call("f", '{"x": 1}'),
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call("f", "{}")),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', call("f", '{"x": 1}')),
        (
            "llama3",
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            [*call("f", "{}"), *call("g", "{}")],
        ),
        (
            "mistral",
            't[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
            [*TAIL, *call("f", "{}"), *call("g", "{}")],
        ),
        (
            "mistral",
            '[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[CALL_ID]123[ARGS]{}',
            [*call("f", '{"x": 1}'), *call("g", "{}")],
        ),
        (
            "array",
            '[{"name":"f","parameters":{"x":1}},{"name":"g","parameters":{}}]',
            [*call("f", '{"x":1}'), *call("g", "{}")],
        ),
    ],
)
def test_calls_are_found(layout: str, text: str, events: list[Event]) -> None:
    assert heard(layout, text) == events


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>'),  # no such tool
        ("hermes", "<tool_call>f(1)</tool_call>"),
        ("hermes", "a <tool"),
        ("hermes", '<tool_call>{"name": "f'),
        ("hermes", "<tool_call>{}</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("llama3", '{"name": "Ann", "parameters": {}}'),
        ("llama3", 'It is {"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS]h{}"),
        ("mistral", "[TOOL_CALLS] [1]"),
        ("array", "hello"),
    ],
)
def test_what_is_no_call_stays_content(layout: str, text: str) -> None:
    assert heard(layout, text) == [Content(text)]


def test_a_marker_after_a_broken_call_is_found() -> None:
    text = '<tool_call><tool_call>{"name": "f"}</tool_call>'
    assert heard("hermes", text) == [Content("<tool_call>"), *call("f", "{}")]


@pytest.mark.parametrize("cut", [35, 37, 40])
def test_a_call_that_is_cut_off_has_what_came(cut: int) -> None:
    text = '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>'[:cut]
    assert heard("hermes", text) == ([*call("f", text[35:])] if cut > 35 else [Content(text)])


def test_arguments_are_told_as_they_come() -> None:
    parser = FormatParser(FORMATS["hermes"], NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments":') == []
    assert parser.feed(' {"x"') == call("f", '{"x"')
    assert parser.feed(": 1") == [CallArguments(": 1")]


def test_text_is_held_back_no_longer_than_it_may_be_a_marker() -> None:
    parser = FormatParser(FORMATS["hermes"], NAMES)
    assert parser.feed("a <") == [Content("a ")]
    assert parser.feed("b <tool_cal") == [Content("<b ")]
    assert parser.feed(" ") == [Content("<tool_cal ")]


ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.one_of(st.text(alphabet='{}[]"\\<,: é', max_size=6), st.integers(), st.none()),
    max_size=3,
).map(json.dumps)
SCRAPS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "<|python_tag|>", "f", "{", "}", "[",
     "]", ",", ";", '"', "\n", " ", '{"name":"f","arguments":{}}', '{"name": "h"}', "ü"]
)  # fmt: skip
CALLS = ARGUMENTS.map(lambda text: f'{{"name": "g", "arguments": {text}}}')


@given(layout=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_how_a_text_is_cut_changes_nothing(layout: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(SCRAPS | CALLS, max_size=8)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    edges = [0, *cuts, len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    parser = FormatParser(LAYOUTS[layout], NAMES)
    assert parsed(parser, pieces) == heard(layout, text)


@given(arguments=ARGUMENTS, layout=st.sampled_from(["hermes", "llama3", "mistral", "array"]))
def test_all_arguments_that_json_can_say_arrive_whole(arguments: str, layout: str) -> None:
    form = LAYOUTS[layout]
    text = f'{form.marker}{form.opener}{{"name":"f","arguments":{arguments}}}{form.closer}'
    assert heard(layout, text) == call("f", arguments)


def test_a_forced_call_is_its_arguments() -> None:
    assert parsed(ForcedCall("f"), ["", '{"x"', ":1}"]) == call("f", '{"x":1}')
    assert parsed(ForcedCall("f"), [""]) == []


def test_without_tools_all_is_content() -> None:
    assert parsed(PlainText(), ["<tool_call>", "", "x"]) == [Content("<tool_call>x")]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ("<tool_call>{{ call }}</tool_call>", "hermes"),
        ("[TOOL_CALLS] [{{ call }}]", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ('respond {"name": function name, "parameters": dictionary', "llama3"),
    ],
)
def test_the_format_is_read_off_the_template(template: str | None, name: str) -> None:
    assert detect_format(template) == name
