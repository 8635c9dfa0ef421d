"""The numbers of a request: sampling, choices, latencies, each held to its limits."""

from __future__ import annotations

import math
from typing import Any

from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams, check_sampling
from services.gateway.backend import Targets
from services.gateway.http.openai.schema import ChatRequest, CompletionRequest, GenerationFields

MAX_CHOICES = 128
MAX_STREAM_INTERVAL = 4096
MAX_PRIORITY = 2**31 - 1
MAX_TARGET_MS = 24 * 3600 * 1000.0

_DEFAULT_COMPLETION_TOKENS = 16
_NOT_COPIED = {"max_tokens", "logprobs", "prompt_logprobs", "bad_words", "grammar"}
_COPIED = tuple(name for name in SamplingParams.__struct_fields__ if name not in _NOT_COPIED)


def sampling_params(
    fields: GenerationFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    bad_words: list[list[int]] | None = None,
    grammar: str = "",
) -> SamplingParams:
    """Checked sampling parameters of a request: those given here, which each endpoint finds in its
    own way, and the fields of the same names. Raises InvalidRequestError."""
    given = {name: getattr(fields, name) for name in _COPIED if getattr(fields, name) is not None}
    params = SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        bad_words=bad_words or [],
        grammar=grammar,
        **given,
    )
    try:
        check_sampling(params)
    except OverflowError as error:  # JSON has integers beyond any float
        raise InvalidRequestError("a number is far out of range") from error
    return params


def most_tokens(fields: GenerationFields) -> int | None:
    """The tokens of an answer, by the newer name or the older one."""
    newer = fields.max_completion_tokens
    most = fields.max_tokens if newer is None else newer
    is_open = most is None and isinstance(fields, CompletionRequest)
    return _DEFAULT_COMPLETION_TOKENS if is_open else most


def stop_strings(fields: GenerationFields) -> list[str]:
    """The stop strings of a request, unchecked."""
    stop = fields.stop or []
    return [stop] if isinstance(stop, str) else stop


def num_choices(fields: GenerationFields, num_prompts: int) -> tuple[int, int]:
    """How many choices each prompt gets, and of how many they are the best."""
    n = 1 if fields.n is None else fields.n
    best_of = n if fields.best_of is None else fields.best_of
    if n < 1:
        raise InvalidRequestError(f"n must be at least 1, got {n}", field="n")
    if best_of < n:
        raise InvalidRequestError(
            f"best_of must be at least n, which is {n}, got {best_of}", field="best_of"
        )
    if best_of > n and fields.stream:
        raise InvalidRequestError(
            "best_of above n cannot be streamed: the best are known at the end", field="best_of"
        )
    if num_prompts * best_of > MAX_CHOICES:
        raise too_many_choices(num_prompts * best_of, "n" if best_of == n else "best_of")
    return n, best_of


def too_many_choices(num_choices: int, field: str = "n") -> InvalidRequestError:
    return InvalidRequestError(
        f"a request has at most {MAX_CHOICES} choices (prompts times n), got {num_choices}",
        field=field,
    )


def check_streaming(fields: GenerationFields) -> None:
    """Raise InvalidRequestError for what goes ill with a stream, or is for one not asked for."""
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true", field="stream_options")
    interval = fields.stream_interval
    if interval is not None and not 1 <= interval <= MAX_STREAM_INTERVAL:
        raise InvalidRequestError(
            f"stream_interval must be at least 1 and at most {MAX_STREAM_INTERVAL}, got {interval}",
            field="stream_interval",
        )
    if fields.stream and prompt_logprobs(fields) is not None:
        raise InvalidRequestError(
            "prompt_logprobs cannot be streamed; echo with logprobs can", field="prompt_logprobs"
        )


def prompt_logprobs(fields: GenerationFields) -> int | None:
    """SamplingParams.prompt_logprobs as asked for by that name; false is none, true the least."""
    asked = fields.prompt_logprobs
    if isinstance(asked, bool):
        return 0 if asked else None
    return asked


def chat_logprobs(fields: ChatRequest) -> int | None:
    """SamplingParams.logprobs of a chat request. Raises InvalidRequestError."""
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    return None


def priority(fields: GenerationFields) -> int:
    """Lower goes first. Raises InvalidRequestError."""
    given = fields.priority or 0
    if not -MAX_PRIORITY <= given <= MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be at least {-MAX_PRIORITY} and at most {MAX_PRIORITY}, got {given}",
            field="priority",
        )
    return given


def targets(fields: GenerationFields) -> Targets:
    """The latencies asked for. Raises InvalidRequestError."""
    return Targets(
        ttft_ms=_target(fields.ttft_target_ms, "ttft_target_ms"),
        tpot_ms=_target(fields.tpot_target_ms, "tpot_target_ms"),
    )


def _target(given: float | None, field: str) -> float:
    if given is None:
        return 0.0
    if not (math.isfinite(given) and 0 < given <= MAX_TARGET_MS):
        raise InvalidRequestError(
            f"{field} must be above 0 and at most {MAX_TARGET_MS:g}, got {given}", field=field
        )
    return given


def echoed(fields: ChatRequest, messages: list[dict[str, Any]]) -> str:
    """What the answer to a conversation begins with: the text it goes on from, if it is wanted."""
    last = messages[-1]
    is_own = last["role"] == "assistant" and isinstance(last.get("content"), str)
    return str(last["content"]) if fields.echo and is_own else ""
