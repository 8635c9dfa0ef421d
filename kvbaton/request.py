"""From keyword arguments to a `generate` message, refused here when its shape is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from kvbaton.codec import encode
from kvbaton.conversation import ChatMessage
from kvbaton.errors import TooLargeError, UnprocessableError
from kvbaton.protocol import MAX_REQUEST_BYTES, Generate
from kvbaton.questions import Question
from kvbaton.sampling import SamplingParams

Turn = Mapping[str, Any] | ChatMessage


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; None is the same as not given.

    A request has exactly one of text, `token_ids` and `messages`. `stop` ends the output before any
    of these strings. `deadline_s` counts from the moment the gateway has the request. Prompts share
    cached KV only with prompts of an equal `cache_salt`. `bad_words` may be texts or token ids.
    docs/protocol.md says of each what it means: by the same names in `generate` and `sampling`.
    """

    token_ids: Sequence[int] | None
    messages: Sequence[Turn] | None
    model: str | None
    stop: str | Sequence[str] | None
    deadline_s: float | None
    cache_salt: str | None
    n: int | None
    best_of: int | None
    echo: bool | None
    include_stop_str_in_output: bool | None
    truncate_prompt_tokens: int | None
    add_special_tokens: bool | None
    skip_special_tokens: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    priority: int | None
    user: str | None
    session_id: str | None
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    explain: bool | None
    traceparent: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str | Sequence[int]] | None


_LISTS = ("token_ids", "stop", "stop_token_ids", "allowed_token_ids", "tools")


def make_request(request_id: int, text: str | None, options: RequestOptions) -> Generate:
    """The message. Raises TypeError for an unknown option, UnprocessableError for a value of the
    wrong type."""
    unknown = options.keys() - RequestOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    try:
        for name in _LISTS:
            if name in fields:
                fields[name] = list(fields[name])
        if "deadline_s" in fields:
            fields["deadline_ms"] = milliseconds(fields.pop("deadline_s"))
        if "messages" in fields:
            fields["messages"] = plain_turns(fields["messages"])
        words = list(fields.pop("bad_words", ()))
        sampling = {k: fields.pop(k) for k in SamplingParams.__struct_fields__ if k in fields}
        if "logit_bias" in sampling:
            sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
        sampling["bad_words"] = [list(word) for word in words if not isinstance(word, str)]
        fields["bad_words"] = [word for word in words if isinstance(word, str)]
        values = {"type": "generate", "id": request_id, "text": text, "sampling": sampling}
        return msgspec.convert(values | fields, Generate)
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise UnprocessableError(f"not a request of this protocol: {error}") from error


def plain_turns(messages: Sequence[Turn]) -> list[Any]:
    """The messages of a conversation, each with its content as one text."""
    return [_plain_turn(message) for message in messages]


def _plain_turn(message: Turn) -> Any:
    """OpenAI's API has content in parts too: those of text are joined, as at the HTTP API."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    if any(part["type"] != "text" for part in parts):
        raise TypeError("of the parts of a message's content, only those of type text are known")
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def milliseconds(seconds: float) -> int:
    """Raises ValueError, OverflowError or TypeError for what is no number of seconds."""
    return math.ceil(seconds * 1000)


def encode_request(message: Generate | Question) -> bytes:
    """Raises UnprocessableError for what has no bytes, TooLargeError for more than the protocol's
    limit of them."""
    try:
        raw = encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UnprocessableError(f"not a request of this protocol: {error}") from error
    if len(raw) > MAX_REQUEST_BYTES:
        raise TooLargeError(f"the request has {len(raw)} bytes, the limit is {MAX_REQUEST_BYTES}")
    return raw
