"""Structured output: what a request says its answer must look like, as one grammar's source.

Nothing is compiled here; grammars.py does that, off the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.grammars import JsonOptions, Kind, Source
from services.gateway.http.openai.schema import GenerationFields, Unread

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_CHOICES = 1024

_NAMES: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
# vLLM's older names, and SGLang's, for what structured_outputs calls by another.
_ALIASES: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's field of that name. Just one of the first five may be there."""

    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    regex: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    choice: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    grammar: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    json_object: bool | None = None
    structural_tag: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """A schema with its name. Without `strict` as with it; false drops what cannot be enforced."""

    schema: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """OpenAI's response_format. `type`: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


def parse_structure(fields: GenerationFields) -> Source | None:
    """What the answer must look like, or None for any text.

    Raises InvalidRequestError for wrong values, and for two wishes at once.
    """
    found = [*_response_format(fields), *_structured_outputs(fields), *_aliases(fields)]
    if len(found) > 1:
        names = " and ".join(source.field for source in found)
        raise InvalidRequestError(
            f"{names} contradict each other: one alone can say what the answer looks like",
            field=found[1].field,
        )
    return found[0] if found else None


def schema_source(
    raw: Unread, field: str, *, lenient: bool = False, options: JsonOptions | None = None
) -> Source:
    """The source for a JSON schema, given as an object or as a text that holds one."""
    options = options or JsonOptions()
    if lenient:
        options = msgspec.structs.replace(options, lenient=True)
    text = json.dumps(read_schema(raw, field), ensure_ascii=False, separators=(",", ":"))
    return Source(field, "json", text, options)


def read_schema(raw: Unread, field: str) -> dict[str, Any]:
    """A schema's object, its size and depth bounded."""
    value = bounded(raw, field)
    if isinstance(value, str):
        try:
            value = bounded(msgspec.Raw(value.encode("utf-8", "replace")), field)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{field}: {error}", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be a JSON schema, an object", field=field)
    return value


def _response_format(fields: GenerationFields) -> Iterator[Source]:
    raw = given(fields.response_format)
    if raw is None:
        return
    check_bytes(raw, "response_format")
    wish = decode(raw, ResponseFormat, "response_format")
    field = "response_format.json_schema"
    if wish.type == "json_object":
        yield _any_object("response_format", JsonOptions())
    elif wish.type == "json_schema":
        schema = wish.json_schema
        if schema is None or schema.schema is msgspec.UNSET:
            raise InvalidRequestError(f"{field}.schema is missing", field=f"{field}.schema")
        yield schema_source(schema.schema, f"{field}.schema", lenient=schema.strict is False)
    elif wish.type != "text":
        raise InvalidRequestError(
            f"response_format.type must be text, json_object or json_schema, got "
            f"{wish.type[:64]!r}",
            field="response_format.type",
        )


def _structured_outputs(fields: GenerationFields) -> Iterator[Source]:
    raw = given(fields.structured_outputs)
    if raw is None:
        return
    where = "structured_outputs"
    check_bytes(raw, where)
    wish = decode(raw, StructuredOutputs, where)
    for name in ("structural_tag", "disable_additional_properties"):
        if getattr(wish, name) not in (msgspec.UNSET, None, False):
            raise InvalidRequestError(f"{where}.{name} is not supported", field=f"{where}.{name}")
    options = JsonOptions(
        flexible=wish.disable_any_whitespace is False and wish.whitespace_pattern is None,
        whitespace=wish.whitespace_pattern,
    )
    for name in _NAMES:
        found = given(getattr(wish, name))
        if found is not None:
            yield _source(name, found, f"{where}.{name}", options)
    if wish.json_object:
        yield _any_object(f"{where}.json_object", options)


def _aliases(fields: GenerationFields) -> Iterator[Source]:
    for field, name in _ALIASES.items():
        raw = given(getattr(fields, field))
        if raw is not None:
            yield _source(name, raw, field, JsonOptions())


def _source(name: Kind, raw: msgspec.Raw, field: str, options: JsonOptions) -> Source:
    check_bytes(raw, field)
    if name == "json":
        return schema_source(raw, field, options=options)
    if name == "choice":
        choices = decode(raw, list[str], field)
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequestError(
                f"{field} holds 1 to {MAX_CHOICES} texts, got {len(choices)}", field=field
            )
        return Source(field, name, json.dumps(choices))
    return Source(field, name, decode(raw, str, field))


def _any_object(field: str, options: JsonOptions) -> Source:
    return Source(field, "json", '{"type":"object"}', options)


def given(raw: Unread) -> msgspec.Raw | None:
    """The value, unless it says nothing: null, or empty."""
    if raw is msgspec.UNSET or bytes(raw) in (b"null", b"", b'""', b"[]"):
        return None
    assert isinstance(raw, msgspec.Raw)
    return raw


def check_bytes(raw: msgspec.Raw, field: str, most_bytes: int = MAX_BYTES) -> None:
    """Raise InvalidRequestError (`field`) for too long a text."""
    num_bytes = len(bytes(raw))
    if num_bytes > most_bytes:
        raise InvalidRequestError(
            f"{field} has at most {most_bytes} bytes, got {num_bytes}", field=field
        )


def bounded(raw: Unread, field: str, *, depth: int = MAX_DEPTH, most_bytes: int = MAX_BYTES) -> Any:
    """The JSON value. Raises InvalidRequestError (`field`) for a large or deeply nested one."""
    assert isinstance(raw, msgspec.Raw)
    check_bytes(raw, field, most_bytes)
    value = decode(raw, object, field)
    level = [value]
    for _ in range(depth):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise InvalidRequestError(f"{field} is nested deeper than {depth} levels", field=field)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
