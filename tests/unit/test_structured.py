"""What an answer must look like, in all the names that clients have for it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from kvbaton.errors import InvalidRequestError, KvbatonError, OverloadedError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.grammars import Grammars, JsonOptions, Source, compile_source
from services.gateway.http.openai.schema import CompletionRequest
from services.gateway.http.openai.structured import parse_structure
from tests.unit.gateway_fakes import DEMO, EOS

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
YES, NO = '{"n":1}', '{"n":"x"}'


def source_of(**fields: Any) -> Source | None:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return parse_structure(decode(body, CompletionRequest))


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((DEMO / "tokenizer.json").read_text(), eos_token=EOS)


def accepts(tokenizer: LLTokenizer, text: str, **fields: Any) -> bool:
    source = source_of(**fields)
    assert source is not None
    matcher = LLMatcher(tokenizer, compile_source(source))
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def response_format(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", **schema}}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (response_format(schema=SCHEMA), YES, NO),
        (response_format(schema=SCHEMA, strict=True), YES, '{"n": 1}'),
        ({"response_format": {"type": "json_object"}}, '{"a":[1,{}]}', "[1]"),
        ({"structured_outputs": {"json": SCHEMA}}, YES, NO),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, YES, NO),
        ({"structured_outputs": {"regex": "[a-c]+/"}}, "abc/", "abd/"),
        ({"structured_outputs": {"choice": ['"é', "no\n"]}}, '"é', "no"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b" start'}}, "bba", "bb"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"guided_json": SCHEMA}, YES, NO),
        ({"guided_regex": r"^\d{2}$"}, "12", "123"),
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"guided_grammar": 'root ::= "a" [0-9]+'}, "a12", "a"),
        ({"json_schema": json.dumps(SCHEMA)}, YES, NO),
        ({"regex": "x|y"}, "y", "z"),
        ({"ebnf": 'root ::= "a" | "b"'}, "b", "ab"),
    ],
)
def test_every_name_for_it_makes_a_grammar(
    fields: dict[str, Any], good: str, bad: str, tokenizer: LLTokenizer
) -> None:
    assert accepts(tokenizer, good, **fields)
    assert not accepts(tokenizer, bad, **fields)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"disable_any_whitespace": False}, '{ "n":\n1 }'),
        ({"whitespace_pattern": " ?"}, '{ "n": 1 }'),
    ],
)
def test_blanks_are_allowed_where_asked_for(
    options: dict[str, Any], text: str, tokenizer: LLTokenizer
) -> None:
    assert accepts(tokenizer, text, structured_outputs={"json": SCHEMA, **options})
    assert not accepts(tokenizer, text, structured_outputs={"json": SCHEMA})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}, "guided_choice": [], "regex": ""},
    ],
)
def test_nothing_asked_is_any_text(fields: dict[str, Any]) -> None:
    assert source_of(**fields) is None


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice", "regex"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.regex",
            "structured_outputs.choice",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format",
            "guided_regex",
        ),
    ],
)
def test_two_wishes_contradict(fields: dict[str, Any], first: str, second: str) -> None:
    with pytest.raises(InvalidRequestError, match="contradict") as error:
        source_of(**fields)
    assert first in error.value.message
    assert error.value.field == second


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": 5}, "response_format", "expected `object`"),
        (response_format(), "response_format.json_schema.schema", "missing"),
        ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": nested(64)}, "guided_json", "deeper than 64"),
        ({"json_schema": json.dumps(nested(64))}, "json_schema", "deeper than 64"),
        ({"guided_json": {"x": "y" * 2**16}}, "guided_json", "at most 65536 bytes"),
        ({"regex": "y" * 2**16}, "regex", "at most 65536 bytes"),
        ({"guided_choice": ["x"] * 1025}, "guided_choice", "1 to 1024"),
        ({"guided_choice": [1]}, "guided_choice[0]", "expected `str`"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
    ],
)
def test_a_wrong_wish_is_refused_before_it_is_compiled(
    fields: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        source_of(**fields)
    assert error.value.field == field


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    grammars = Grammars()
    yield grammars
    grammars.close()


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"ebnf": "root := a"}, "ebnf", "GBNF"),
        ({"ebnf": "root ::= " + "(" * 9999}, "ebnf", "recursion"),
        ({"guided_grammar": "start: nobody"}, "guided_grammar", "nobody"),
        ({"guided_grammar": "start: <|eos|>"}, "guided_grammar", "special tokens"),
        ({"guided_json": {"type": "nothing"}}, "guided_json", "nothing"),
        ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json", "fetch"),
        (
            response_format(schema={"type": "array", "uniqueItems": True}),
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
    ],
)
async def test_what_is_no_grammar_is_refused_by_field(
    fields: dict[str, Any], field: str, words: str, grammars: Grammars
) -> None:
    source = source_of(**fields)
    assert source is not None
    with pytest.raises(InvalidRequestError, match=words) as error:
        await grammars.compile(source)
    assert error.value.field == field
    assert len(error.value.message) < 500


def test_what_cannot_be_enforced_is_dropped_where_the_schema_is_not_strict() -> None:
    schema = {"type": "array", "uniqueItems": True}
    source = source_of(**response_format(schema=schema, strict=False))
    assert source is not None
    assert compile_source(source)


def alternatives(number: int) -> dict[str, Any]:
    """Four that go with the four of every other: their products are many."""
    names = [f"p{number}_{other}" for other in range(4)]
    parts = [{"properties": {name: {"type": "string"}}, "required": [name]} for name in names]
    return {"anyOf": [{"type": "object", **part} for part in parts]}


HOSTILE: dict[str, dict[str, Any]] = {
    "products": {"guided_json": {"allOf": [alternatives(number) for number in range(6)]}},
    "properties": {
        "guided_json": {"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
    },
    "repetitions": {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    "states": {"regex": "(a|b)*a(a|b){2000}"},
    "references": {
        "guided_json": {
            "$defs": {
                f"a{n}": {"properties": {c: {"$ref": f"#/$defs/a{n + 1}"} for c in "xy"}}
                for n in range(30)
            }
            | {"a30": {}},
            "$ref": "#/$defs/a0",
        }
    },
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_grammars_are_compiled_or_refused_soon(name: str) -> None:
    source = source_of(**HOSTILE[name])
    assert source is not None
    begin = time.thread_time()
    try:
        compile_source(source)
    except KvbatonError as error:
        assert isinstance(error, InvalidRequestError)  # noqa: PT017 - both ways are right
    assert time.thread_time() - begin < 10  # measured: 0.6 s


async def test_a_grammar_is_compiled_once(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_once(source: Source) -> str:
        compiled.append(source)
        return source.text

    monkeypatch.setattr("services.gateway.http.openai.grammars.compile_source", compile_once)
    for text in ("a", "a", "b", "a"):
        assert await grammars.compile(Source("regex", "regex", text)) == text
    assert [source.text for source in compiled] == ["a", "b"]


async def test_too_many_grammars_at_once_are_refused(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.openai.grammars._MAX_WAITING", 2)
    sources = [Source("regex", "regex", f"a{number}") for number in range(4)]
    asked = (grammars.compile(source) for source in sources)
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in found] == [str, str, OverloadedError, OverloadedError]


def test_options_of_the_server_outdo_those_in_a_schema() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    source = Source("guided_json", "json", json.dumps(schema), JsonOptions())
    found = json.loads(compile_source(source))["grammars"][0]["json_schema"]["x-guidance"]
    assert found["whitespace_flexible"] is False


def test_grammars_need_no_torch() -> None:
    code = "import sys, services.gateway.http.openai.grammars; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
