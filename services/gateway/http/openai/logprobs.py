"""Log probabilities as JSON can carry them, and what their tokens are called there."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.gateway.backend import PromptToken
from services.gateway.text.model import TextModel

_LOWEST = -9999.0  # what vLLM shows for a token that cannot be


def finite(logprob: float) -> float:
    """The logprob, or a very low number for minus infinity, which JSON does not have."""
    return max(logprob, _LOWEST)


class TokenNames:
    """What a token is called: as it reads on its own or, `as_ids`, by its number."""

    def __init__(self, model: TextModel, *, as_ids: bool) -> None:
        self._model = model
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._model.token_text(token_id)


class PromptLogprob(msgspec.Struct, frozen=True):
    """One token at one place of a prompt. `rank` counts from 1; null: not among the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


def prompt_logprobs(tokens: Sequence[PromptToken], count: int, names: TokenNames) -> PromptLogprobs:
    """As vLLM shows them: the first token has none, each other is there with the `count`
    likeliest at its place."""
    shown: PromptLogprobs = [None]
    for token in tokens:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top_logprobs, 1)}
        entries = ((token.token_id, token.logprob), *token.top_logprobs[:count])
        shown.append({
            token_id: PromptLogprob(finite(logprob), ranks.get(token_id), names(token_id))
            for token_id, logprob in entries
        })  # fmt: skip
    return shown
