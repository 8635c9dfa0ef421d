"""The answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from services.gateway.http.openai.answer import Envelope
from services.gateway.http.openai.choices import Choices
from services.gateway.http.openai.logprobs import (
    PromptLogprobs,
    TokenNames,
    finite,
    prompt_logprobs,
)
from services.gateway.text.generation import TextToken

_NO_TOP: tuple[tuple[int, float], ...] = ()


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token. text_offset counts characters of the tokens' own texts.

    The first token of an echoed prompt has no logprob.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True, frozen=True):
    """One choice, or some tokens of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class CompletionShow:
    """What an answer tells. `logprobs` and `prompt_logprobs` None: none, else so many of the
    likeliest. `echo`: the prompts' texts, which come first; empty: they do not."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: Sequence[str] = ()
    token_ids: bool = False


class CompletionView:
    """Shows tokens as choices of a text completion."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, choices: Choices, show: CompletionShow, names: TokenNames) -> None:
        self._choices = choices
        self._show = show
        self._names = names
        self._offsets = [0] * len(choices)

    def head(self, _envelope: Envelope) -> None:
        """All is said in the choices."""

    def opening(self, index: int) -> CompletionChoice | None:
        """The prompt, if it is wanted."""
        return self._choice(index, (), has_prompt=True) if self._show.echo else None

    def chunk(self, index: int, tokens: Sequence[TextToken]) -> CompletionChoice:
        is_first = tokens[0].index == 0
        return self._choice(index, tokens, has_prompt=is_first and not self._show.echo)

    def whole(self, index: int, tokens: Sequence[TextToken]) -> CompletionChoice:
        return self._choice(index, tokens, has_prompt=True)

    def _choice(
        self, index: int, tokens: Sequence[TextToken], *, has_prompt: bool
    ) -> CompletionChoice:
        show, job = self._show, self._choices.job
        finish_reason = tokens[-1].finish_reason if tokens else None
        if job.drops_output:
            tokens, finish_reason = (), finish_reason and "length"
        prompt = index // job.n
        text = "".join(token.text for token in tokens)
        unset = msgspec.UNSET
        return CompletionChoice(
            index=index,
            text=show.echo[prompt] + text if show.echo and has_prompt else text,
            logprobs=self._logprobs(index, tokens, has_prompt=has_prompt),
            finish_reason=finish_reason,
            token_ids=[token.token_id for token in tokens] if show.token_ids else unset,
            prompt_token_ids=job.prompts[prompt] if show.token_ids and has_prompt else unset,
            prompt_logprobs=unset
            if show.prompt_logprobs is None or not has_prompt
            else prompt_logprobs(
                self._choices.prompt_logprobs(prompt), show.prompt_logprobs, self._names
            ),
        )

    def _logprobs(
        self, index: int, tokens: Sequence[TextToken], *, has_prompt: bool
    ) -> CompletionLogprobs | None:
        show = self._show
        if show.logprobs is None:
            return None
        shown = CompletionLogprobs([], [], [], [])
        if show.echo and has_prompt:
            prompt = index // self._choices.job.n
            self._add(shown, index, self._choices.job.prompts[prompt][0], None)
            for entry in self._choices.prompt_logprobs(prompt):
                top = entry.top_logprobs[: show.logprobs]
                self._add(shown, index, entry.token_id, entry.logprob, top)
        for token in tokens:
            self._add(shown, index, token.token_id, token.logprob, token.top_logprobs)
        return shown

    def _add(
        self,
        shown: CompletionLogprobs,
        index: int,
        token_id: int,
        logprob: float | None,
        likeliest: Sequence[tuple[int, float]] = _NO_TOP,
    ) -> None:
        text = self._names(token_id)
        top: dict[str, float] | None = None
        if logprob is not None:
            logprob = finite(logprob)
            top = {}
            for each, its_logprob in (*likeliest, (token_id, logprob)):
                # Tokens may read alike, such as parts of a character: the likeliest stands.
                top.setdefault(self._names(each), finite(its_logprob))
        shown.tokens.append(text)
        shown.token_logprobs.append(logprob)
        shown.top_logprobs.append(top)
        shown.text_offset.append(self._offsets[index])
        self._offsets[index] += len(text)
