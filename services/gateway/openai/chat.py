"""The answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.gateway.generation import TextToken
from services.gateway.openai.logprobs import finite
from services.gateway.text import TextModel


class TopLogprob(msgspec.Struct, frozen=True):
    """How likely one token was. `bytes` are those of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True):
    """The token chosen, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A whole answer or, without a role, a piece of it."""

    content: str
    role: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, frozen=True):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatView:
    """Shows tokens as choices of a chat completion."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, model: TextModel, *, with_logprobs: bool) -> None:
        self._model = model
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> ChatChunk:
        """Says who speaks, before the first token of each choice."""
        return ChatChunk(index, ChatMessage("", "assistant"))

    def chunk(self, index: int, token: TextToken) -> ChatChunk:
        delta = ChatMessage(token.text)
        return ChatChunk(index, delta, self._logprobs((token,)), token.finish_reason)

    def whole(self, index: int, tokens: Sequence[TextToken]) -> ChatChoice:
        message = ChatMessage("".join(token.text for token in tokens), "assistant")
        return ChatChoice(index, message, self._logprobs(tokens), tokens[-1].finish_reason)

    def _logprobs(self, tokens: Sequence[TextToken]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs([
            TokenLogprob(
                *self._entry(token.token_id, token.logprob),
                [TopLogprob(*self._entry(*entry)) for entry in token.top_logprobs],
            )
            for token in tokens
        ])  # fmt: skip

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        text = self._model.token_text(token_id)
        return text, finite(logprob), list(text.encode())
