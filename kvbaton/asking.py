"""The questions of a client beside `generate`: asked again until a gateway has answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from kvbaton.errors import KvbatonError, ProtocolError, UnprocessableError
from kvbaton.gateways import Gateways
from kvbaton.questions import (
    Counted,
    Detokenize,
    Detokenized,
    ModelCard,
    ModelList,
    Models,
    Prompt,
    PromptToken,
    Question,
    Score,
    Scored,
    Stats,
    Tokenize,
    Tokenized,
)
from kvbaton.request import Turn, encode_request, milliseconds, plain_turns
from kvbaton.retry import Retried
from kvbaton.session import Event

A = TypeVar("A", Scored, Tokenized, Detokenized, ModelList, Counted)
Q = TypeVar("Q", Score, Tokenize, Detokenize, Models, Stats)


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text's tokens, each with how likely it was after those before it; the first has none."""

    tokens: list[PromptToken]

    @property
    def logprob(self) -> float:
        """How likely the text is after its first token: the sum of its tokens' logprobs."""
        return sum(token.logprob for token in self.tokens if token.logprob is not None)


class AskedQuestion(Retried):
    """A question that changes nothing: it is simply asked again. Its `sink` hears the answer, and
    what came before that is in `prompts`."""

    def __init__(self, message: Question, sink: Callable[[Event], None]) -> None:
        """Raises UnprocessableError and TooLargeError for what cannot be sent."""
        super().__init__(message.id, sink)
        encode_request(message)
        self.prompts: dict[int, list[PromptToken]] = {}
        self._message = message
        self._deadline_ms = message.deadline_ms if isinstance(message, Score) else None
        self._was_sent = False

    def encoded(self, now: float) -> bytes:
        self.prompts = {}
        message = self._message
        if not self._was_sent:
            self._was_sent = True
            self._begin_deadline(self._deadline_ms, now)
        elif isinstance(message, Score):
            deadline_ms = self._rest_of(self._deadline_ms, now)
            message = msgspec.structs.replace(message, deadline_ms=deadline_ms)
        return encode_request(message)

    def _take(self, event: Event) -> None:
        if not isinstance(event, Prompt):
            self.end(event)
            return
        tokens = self.prompts.setdefault(event.choice, [])
        self._news()
        for token in event.tokens:
            if token.index != len(tokens):
                self.end(ProtocolError(f"token {len(tokens)} was due, the gateway sent another"))
                return
            tokens.append(token)


class Questions:
    """What both clients ask. Every question is safe to repeat, and is repeated where a gateway is
    lost or not ready; each raises the kvbaton.errors that end it."""

    def __init__(self, gateways: Gateways, request_ids: Iterator[int]) -> None:
        self._gateways = gateways
        self._request_ids = request_ids

    async def score(
        self,
        texts: Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        model: str | None = None,
        top_logprobs: int = 0,
        add_special_tokens: bool = True,
        deadline_s: float | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[ScoredText]:
        """How likely the model finds each of `texts`, or of the lists of `token_ids`.

        `top_logprobs` asks for so many likeliest tokens at each place, `add_special_tokens` has
        texts begin as prompts do.
        """
        values: dict[str, Any] = {
            "texts": None if texts is None else list(texts),
            "token_ids": None if token_ids is None else [list(ids) for ids in token_ids],
            "model": model,
            "top_logprobs": top_logprobs,
            "add_special_tokens": add_special_tokens,
            "deadline_ms": None if deadline_s is None else milliseconds(deadline_s),
            "cache_salt": cache_salt,
            "priority": priority,
        }
        _, prompts = await self._ask(self._message(Score, values), Scored)
        return [ScoredText(prompts[index]) for index in sorted(prompts)]

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        return_token_strs: bool = False,
    ) -> Tokenized:
        """The `token_ids` that `generate` would make of a text or a conversation, and with
        `return_token_strs` how each reads alone."""
        values: dict[str, Any] = {
            "text": text,
            "messages": None if messages is None else plain_turns(messages),
            "model": model,
            "add_special_tokens": add_special_tokens,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
            "tools": list(tools),
            "return_token_strs": return_token_strs,
        }
        answer, _ = await self._ask(self._message(Tokenize, values), Tokenized)
        return answer

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = False,
    ) -> str:
        """The text of tokens."""
        values: dict[str, Any] = {
            "token_ids": list(token_ids),
            "model": model,
            "skip_special_tokens": skip_special_tokens,
        }
        answer, _ = await self._ask(self._message(Detokenize, values), Detokenized)
        return answer.text

    async def models(self) -> list[ModelCard]:
        """The models that are served."""
        answer, _ = await self._ask(self._message(Models, {}), ModelList)
        return answer.models

    async def stats(self) -> dict[str, float]:
        """A gateway's counts and gauges, by names that may change. They tell about all tenants:
        where keys are used, this takes an operator's."""
        answer, _ = await self._ask(self._message(Stats, {}), Counted)
        return answer.stats

    def _message(self, kind: type[Q], values: dict[str, Any]) -> Q:
        fields = {"type": kind.__struct_config__.tag, "id": next(self._request_ids), **values}
        try:
            return msgspec.convert(fields, kind)
        except (TypeError, ValueError) as error:
            raise UnprocessableError(f"not a request of this protocol: {error}") from error

    async def _ask(self, message: Q, kind: type[A]) -> tuple[A, dict[int, list[PromptToken]]]:
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def sink(event: Event) -> None:
            if not answer.done():
                answer.set_result(event)

        question = AskedQuestion(message, sink)
        self._gateways.start(question)
        try:
            event = await answer
        except asyncio.CancelledError:
            self._gateways.cancel(question.id)
            raise
        if isinstance(event, KvbatonError):
            raise event
        if not isinstance(event, kind):
            raise ProtocolError("the gateway answered what was not asked")
        return event, question.prompts
