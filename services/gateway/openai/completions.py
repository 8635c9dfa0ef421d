"""The answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.gateway.generation import TextToken
from services.gateway.openai.logprobs import finite
from services.gateway.text import TextModel


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token. text_offset counts characters of the tokens' own texts."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One choice, or one token of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionView:
    """Shows tokens as choices of a text completion."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: TextModel, num_choices: int, *, with_logprobs: bool) -> None:
        self._model = model
        self._with_logprobs = with_logprobs
        self._offsets = [0] * num_choices

    def opening(self, _index: int) -> None:
        """Nothing comes before the first token."""

    def chunk(self, index: int, token: TextToken) -> CompletionChoice:
        return self.whole(index, (token,))

    def whole(self, index: int, tokens: Sequence[TextToken]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text="".join(token.text for token in tokens),
            logprobs=self._logprobs(index, tokens) if self._with_logprobs else None,
            finish_reason=tokens[-1].finish_reason,
        )

    def _logprobs(self, index: int, tokens: Sequence[TextToken]) -> CompletionLogprobs:
        shown = CompletionLogprobs([], [], [], [])
        for token in tokens:
            text = self._model.token_text(token.token_id)
            top: dict[str, float] = {}
            for token_id, logprob in (*token.top_logprobs, (token.token_id, token.logprob)):
                # Tokens may read alike, such as parts of a character: the likeliest stands.
                top.setdefault(self._model.token_text(token_id), finite(logprob))
            shown.tokens.append(text)
            shown.token_logprobs.append(finite(token.logprob))
            shown.top_logprobs.append(top)
            shown.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return shown
