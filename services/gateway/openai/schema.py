"""What the OpenAI endpoints take: typed, each wrong value refused by the name of its field."""

from __future__ import annotations

import re
import sys
from typing import Any, TypeVar

import msgspec

from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams, check_sampling

MAX_CHOICES = 128
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 4096  # of all messages together
MAX_STRINGS = 64 * 1024  # names included

T = TypeVar("T")

_AT = re.compile(r"(?s)(.*) - at `\$\.?(.*)`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_NOT_COPIED = {
    "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words",
    "grammar",
}  # fmt: skip
_COPIED = tuple(name for name in SamplingParams.__struct_fields__ if name not in _NOT_COPIED)


class StreamOptions(msgspec.Struct, frozen=True):
    """Whether usage comes with the last chunk, or with every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True, frozen=True):
    """What both endpoints have in common. null means the default everywhere."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None


class CompletionRequest(GenerationFields, kw_only=True, frozen=True):
    """POST /v1/completions. `prompt`: text, texts, token ids or lists of token ids."""

    prompt: msgspec.Raw
    logprobs: int | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ChatRequest(GenerationFields, kw_only=True, frozen=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


# Known, and without influence on the answer.
IGNORED_FIELDS = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "request_id",
    "safety_identifier", "service_tier", "spaces_between_special_tokens", "store", "user",
})  # fmt: skip


def decode_body(body: bytes, kind: type[T]) -> T:
    """`decode`, once it is sure that the values cannot take much more memory than the text."""
    # Millions of tiny strings would. A quote in a string is escaped; so may a closing one seem,
    # after a backslash: then this finds half of the strings.
    num_quotes = body.count(b'"')
    if num_quotes > 2 * MAX_STRINGS and num_quotes - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise InvalidRequestError(f"the body has more than {MAX_STRINGS} strings and names")
    return decode(body, kind)


def decode(body: bytes | msgspec.Raw, kind: type[T], where: str = "") -> T:
    """The typed value in a JSON text. `where` names the field that the text is the value of.

    Raises InvalidRequestError that names the field, or says why the text is no JSON.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, field = _explain(str(error), where)
        raise InvalidRequestError(message, field=field) from error
    except RecursionError as error:
        limit = sys.getrecursionlimit()  # less what is on the stack already
        raise InvalidRequestError(
            f"the body is nested too deeply, the limit is below {limit} levels"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _explain(message: str, where: str) -> tuple[str, str | None]:
    """msgspec's message as ours, and the name of the field at fault."""
    found = _AT.match(message)
    if found:
        message, path = found.groups()
        where += path if not where or path.startswith("[") or not path else "." + path
    missing = _MISSING.match(message)
    if missing:
        where = f"{where}.{missing[1]}" if where else missing[1]
        return f"{where} is missing", where
    message = message[:1].lower() + message[1:]
    return f"{where or 'the body'}: {message}", where or None


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
            raise _too_many_choices(text.count(b"[") - 1)
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
    calls = message.tool_calls
    if calls is not msgspec.UNSET and bytes(calls).replace(b" ", b"") not in (b"null", b"[]"):
        raise InvalidRequestError("tool_calls is not supported yet", field=f"{where}.tool_calls")
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
    values = {"role": message.role, "content": content, "name": message.name}
    return {name: value for name, value in values.items() if value is not None}


def sampling_params(
    fields: GenerationFields, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Checked sampling parameters of a request. Raises InvalidRequestError."""
    given = {name: getattr(fields, name) for name in _COPIED if getattr(fields, name) is not None}
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)
    try:
        check_sampling(params)
    except OverflowError as error:  # JSON has integers beyond any float
        raise InvalidRequestError("a number is far out of range") from error
    return params


def stop_strings(fields: GenerationFields) -> list[str]:
    """The stop strings of a request, unchecked."""
    stop = fields.stop or []
    return [stop] if isinstance(stop, str) else stop


def check_num_choices(num_prompts: int, n: int) -> None:
    """Raise InvalidRequestError unless every choice has a place."""
    if n < 1:
        raise InvalidRequestError(f"n must be at least 1, got {n}", field="n")
    if num_prompts * n > MAX_CHOICES:
        raise _too_many_choices(num_prompts * n)


def _too_many_choices(num_choices: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"a request has at most {MAX_CHOICES} choices (prompts times n), got {num_choices}",
        field="n",
    )


def check_stream_options(fields: GenerationFields) -> None:
    """Raise InvalidRequestError for options of a stream that is not asked for."""
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true", field="stream_options")


def chat_logprobs(fields: ChatRequest) -> int | None:
    """SamplingParams.logprobs of a chat request. Raises InvalidRequestError."""
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    return None
