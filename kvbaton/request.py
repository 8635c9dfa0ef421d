"""From keyword arguments to a `generate` message, refused here when its shape is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from kvbaton.codec import encode
from kvbaton.errors import TooLargeError, UnprocessableError
from kvbaton.protocol import MAX_REQUEST_BYTES, ChatMessage, Generate
from kvbaton.sampling import SamplingParams


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; None is the same as not given.

    A request has exactly one of text, `token_ids` and `messages`. `stop` ends the output before any
    of these strings. `deadline_s` counts from the moment the gateway has the request. Prompts share
    cached KV only with prompts of an equal `cache_salt`. The rest is
    kvbaton.sampling.SamplingParams.
    """

    token_ids: Sequence[int] | None
    messages: Sequence[Mapping[str, str] | ChatMessage] | None
    model: str | None
    stop: str | Sequence[str] | None
    deadline_s: float | None
    cache_salt: str | None
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


def make_request(request_id: int, text: str | None, options: RequestOptions) -> Generate:
    """The message. Raises TypeError for an unknown option, UnprocessableError for a value of the
    wrong type."""
    unknown = options.keys() - RequestOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    sampling = {k: fields.pop(k) for k in SamplingParams.__struct_fields__ if k in fields}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    try:
        for name in ("token_ids", "messages", "stop"):
            if name in fields:
                fields[name] = list(fields[name])
        if "deadline_s" in fields:
            fields["deadline_ms"] = math.ceil(fields.pop("deadline_s") * 1000)
        return msgspec.convert(
            {"type": "generate", "id": request_id, "text": text, "sampling": sampling, **fields},
            Generate,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UnprocessableError(f"not a request of this protocol: {error}") from error


def encode_request(message: Generate) -> bytes:
    """Raises UnprocessableError for what has no bytes, TooLargeError for more than the protocol's
    limit of them."""
    try:
        raw = encode(message)
    except (ValueError, OverflowError) as error:
        raise UnprocessableError(f"not a request of this protocol: {error}") from error
    if len(raw) > MAX_REQUEST_BYTES:
        raise TooLargeError(f"the request has {len(raw)} bytes, the limit is {MAX_REQUEST_BYTES}")
    return raw
