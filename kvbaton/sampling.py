"""What a client may ask of sampling, with the limits the server holds it to."""

from __future__ import annotations

import math

import msgspec

from kvbaton.errors import InvalidRequestError

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
MAX_ALLOWED_TOKENS = 16 * 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_GRAMMAR_BYTES = 256 * 1024


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How the next token is chosen, and when to stop. Defaults are OpenAI's, but for max_tokens.

    temperature 0 is greedy. `top_k` 0 or -1 means all tokens. With `seed` None one is drawn.
    `logprobs` None gives none, 0 the chosen token's alone, N also the N likeliest.
    `max_tokens` None means up to the model's context. `prompt_logprobs` is the like of `logprobs`
    for the prompt. `logit_bias` is added to the logits of its tokens; with `allowed_token_ids` only
    those are drawn. No output holds one of the sequences of tokens in `bad_words`. `grammar` is one
    in the serialized form of llguidance: the output is a sentence of it; "" for none.
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
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    grammar: str = ""


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
    ("prompt_logprobs", 0, MAX_TOP_LOGPROBS, True),
)
# field, most entries, what they are
_SIZES: tuple[tuple[str, int, str], ...] = (
    ("stop_token_ids", MAX_STOP_TOKEN_IDS, "ids"),
    ("logit_bias", MAX_BIASED_TOKENS, "tokens"),
    ("allowed_token_ids", MAX_ALLOWED_TOKENS, "ids"),
    ("bad_words", MAX_BAD_WORDS, "words"),
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
    for field, most, what in _SIZES:
        size = len(getattr(params, field))
        if size > most:
            raise InvalidRequestError(
                f"{field} holds at most {most} {what}, got {size}", field=field
            )
    _check_masks(params)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens must not exceed max_tokens, got {params.min_tokens} and "
            f"{params.max_tokens}",
            field="min_tokens",
        )


def _check_masks(params: SamplingParams) -> None:
    """What changes the logits of single tokens."""
    for token_id, bias in params.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequestError(
                f"logit_bias must be at least {-MAX_BIAS:g} and at most {MAX_BIAS:g}, got {bias} "
                f"for token {token_id}",
                field="logit_bias",
            )
    for word in params.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(
                f"a bad word has 1 to {MAX_BAD_WORD_TOKENS} tokens, got {len(word)}",
                field="bad_words",
            )
    num_bytes = len(params.grammar.encode())
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"a grammar has at most {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}", field="grammar"
        )
