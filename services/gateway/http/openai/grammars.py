"""Compiles grammars to the serialized form of llguidance, and refuses what is none.

What clients send may be costly to compile: sizes are bounded before, llguidance's own limits bound
the work, and it happens on one thread, so that the event loop goes on. Grammars are kept: clients
send the same ones again and again.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec
from llguidance import LLMatcher, grammar_from

from common.grammar import LIMITS
from kvbaton.errors import InvalidRequestError, OverloadedError

_MAX_WAITING = 64
_MAX_KEPT_BYTES = 8 * 1024 * 1024
_TIMEOUT_S = 10.0
_MAX_REASON_CHARS = 300


Kind = Literal["json", "regex", "choice", "grammar", "lark"]


class JsonOptions(msgspec.Struct, frozen=True):
    """Blanks in JSON: none, unless `flexible`, or as a regular expression in `whitespace` says.

    `lenient` ignores the keywords of a schema that cannot be enforced; otherwise they are errors.
    """

    flexible: bool = False
    whitespace: str | None = None
    lenient: bool = False


class Source(msgspec.Struct, frozen=True):
    """A grammar as its client wrote it, in the request's `field`.

    `kind`: json (a schema), regex, choice (a JSON list of texts), grammar (Lark or GBNF), lark.
    """

    field: str
    kind: Kind
    text: str
    options: JsonOptions = JsonOptions()


class Grammars:
    """Compiles one grammar at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._num_waiting = 0
        self._kept: OrderedDict[Source, str] = OrderedDict()
        self._num_kept_bytes = 0

    async def compile(self, source: Source) -> str:
        """The serialized grammar. Raises InvalidRequestError (the source's field) for what is no
        grammar, and OverloadedError when too many wait."""
        if source in self._kept:
            self._kept.move_to_end(source)
            return self._kept[source]
        if self._num_waiting >= _MAX_WAITING:
            raise _overloaded()
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(_TIMEOUT_S):
                grammar = await loop.run_in_executor(self._thread, compile_source, source)
        except TimeoutError as error:
            raise _overloaded() from error
        finally:
            self._num_waiting -= 1
        self._keep(source, grammar)
        return grammar

    def close(self) -> None:
        """End the thread once it is idle. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _keep(self, source: Source, grammar: str) -> None:
        if source not in self._kept:
            self._kept[source] = grammar
            self._num_kept_bytes += len(source.text) + len(grammar)
        while self._num_kept_bytes > _MAX_KEPT_BYTES:
            oldest, dropped = self._kept.popitem(last=False)
            self._num_kept_bytes -= len(oldest.text) + len(dropped)


def compile_source(source: Source) -> str:
    """The serialized grammar. Raises InvalidRequestError. May take half a second."""
    try:
        grammar = _serialize(source)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    except BaseException as error:  # a panic in Rust is no Exception
        raise _refused(source, str(error)) from error
    is_unsure = any("no tokenizer" in message for message in messages)
    if is_unsure:
        raise _refused(source, "special tokens cannot be named in a grammar")
    if is_error:
        raise _refused(source, messages[0])
    return grammar


def _serialize(source: Source) -> str:
    if source.kind == "json":
        return _serialize_schema(source.text, source.options)
    if source.kind == "regex":
        # The whole answer is meant in any case; some write so.
        text = source.text.removeprefix("^")
        is_anchored = text.endswith("$") and not text.endswith("\\$")
        return LLMatcher.grammar_from_regex(text[:-1] if is_anchored else text)
    return grammar_from(source.kind, source.text)


def _serialize_schema(text: str, options: JsonOptions) -> str:
    overrides: Any = guidance(options)  # its type has no name at run time
    return LLMatcher.grammar_from_json_schema(text, overrides=overrides)


def guidance(options: JsonOptions) -> dict[str, Any]:
    """The options as llguidance takes them, also inside a schema, as "x-guidance"."""
    values: dict[str, Any] = {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": options.flexible,
        "lenient": options.lenient,
    }
    if options.whitespace is not None:
        values["whitespace_pattern"] = options.whitespace
    return values


def embedded_schema(schema: dict[str, Any], options: JsonOptions) -> str:
    """A schema as a rule of a Lark grammar has it."""
    return "%json " + json.dumps({**schema, "x-guidance": guidance(options)})


def _refused(source: Source, reason: str) -> InvalidRequestError:
    reason = " ".join(reason.split())[:_MAX_REASON_CHARS]
    return InvalidRequestError(f"{source.field} is no grammar: {reason}", field=source.field)


def _overloaded() -> OverloadedError:
    return OverloadedError("too many grammars wait to be compiled", retry_after_s=1)
