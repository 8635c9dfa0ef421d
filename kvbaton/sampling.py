"""What a client may ask of sampling, with the limits the server holds it to."""

from __future__ import annotations

import math

import msgspec

from kvbaton.errors import InvalidRequestError

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How the next token is chosen, and when to stop. Defaults are OpenAI's, but for max_tokens.

    temperature 0 is greedy. `top_k` 0 or -1 means all tokens. With `seed` None one is drawn.
    `logprobs` None gives none, 0 the chosen token's alone, N also the N likeliest.
    `max_tokens` None means up to the model's context.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None


# field, lowest, highest, whether the lowest itself is allowed
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("max_tokens", 1, 2**31 - 1, True),
    ("temperature", 0, 100, True),
    ("top_p", 0, 1, False),
    ("top_k", -1, 2**31 - 1, True),
    ("min_p", 0, 1, True),
    ("presence_penalty", -2, 2, True),
    ("frequency_penalty", -2, 2, True),
    ("repetition_penalty", 0, 100, False),
    ("seed", -(2**63), 2**64 - 1, True),
    ("min_tokens", 0, 2**31 - 1, True),
    ("logprobs", 0, MAX_TOP_LOGPROBS, True),
)


def check_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequestError, naming field and limit, unless every value is in range.

    NaN and infinity are never in range: comparisons with NaN are false, so they are asked first.
    """
    for field, low, high, closed in _RANGES:
        value = getattr(params, field)
        if value is None:
            continue
        too_low = value < low if closed else value <= low
        if not math.isfinite(value) or too_low or value > high:
            bound = "at least" if closed else "above"
            raise InvalidRequestError(
                f"{field} must be {bound} {low} and at most {high}, got {value}", field=field
            )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids holds at most {MAX_STOP_TOKEN_IDS} ids, got "
            f"{len(params.stop_token_ids)}",
            field="stop_token_ids",
        )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens must not exceed max_tokens, got {params.min_tokens} and "
            f"{params.max_tokens}",
            field="min_tokens",
        )
