"""The answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from services.gateway.http.openai.answer import Envelope
from services.gateway.http.openai.choices import Choices
from services.gateway.http.openai.logprobs import TokenNames, finite, prompt_logprobs
from services.gateway.text.generation import TextToken


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


class FunctionCall(msgspec.Struct, frozen=True):
    """What is called, or the next piece of its arguments, which are JSON as a text."""

    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool. In a stream it has an index, and the rest but once."""

    function: FunctionCall
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """A whole answer or, without a role, a piece of it."""

    content: str | msgspec.UnsetType | None
    role: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True):
    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class ChatShow:
    """What an answer tells. `echo`: what the answer goes on from, which comes first."""

    logprobs: bool = False
    prompt_logprobs: int | None = None
    echo: str = ""
    token_ids: bool = False


class ChatView:
    """Shows tokens as choices of a chat completion."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, choices: Choices, show: ChatShow, names: TokenNames) -> None:
        self._choices = choices
        self.show = show
        self._names = names

    def head(self, envelope: Envelope) -> None:
        """There is one prompt, so it is told of beside the choices, as vLLM does."""
        if self.show.token_ids:
            envelope.prompt_token_ids = self._choices.job.prompts[0]
        if self.show.prompt_logprobs is not None:
            found = self._choices.prompt_logprobs(0)
            envelope.prompt_logprobs = prompt_logprobs(
                found, self.show.prompt_logprobs, self._names
            )

    def opening(self, index: int) -> ChatChunk:
        """Says who speaks, before the first token of each choice."""
        return ChatChunk(index, AnswerMessage(self.show.echo, "assistant"))

    def chunk(self, index: int, tokens: Sequence[TextToken]) -> ChatChunk:
        delta = self.delta(index, tokens)
        reason = self.reason(index, tokens[-1])
        return ChatChunk(index, delta, self.logprobs(tokens), reason, self.token_ids(tokens))

    def whole(self, index: int, tokens: Sequence[TextToken]) -> ChatChoice:
        message = self.message(index, tokens)
        reason = self.reason(index, tokens[-1])
        return ChatChoice(index, message, self.logprobs(tokens), reason, self.token_ids(tokens))

    def delta(self, _index: int, tokens: Sequence[TextToken], /) -> AnswerMessage:
        """What the next tokens add to an answer."""
        return AnswerMessage("".join(token.text for token in tokens))

    def message(self, _index: int, tokens: Sequence[TextToken], /) -> AnswerMessage:
        """A whole answer."""
        text = self.show.echo + "".join(token.text for token in tokens)
        return AnswerMessage(text, "assistant")

    def reason(self, _index: int, token: TextToken, /) -> str | None:
        """Why the answer ends with this token; None if it does not. Asked after its message."""
        return token.finish_reason

    def token_ids(self, tokens: Sequence[TextToken]) -> list[int] | msgspec.UnsetType:
        """The ids of some tokens, if they are wanted."""
        return [token.token_id for token in tokens] if self.show.token_ids else msgspec.UNSET

    def logprobs(self, tokens: Sequence[TextToken]) -> ChatLogprobs | None:
        """The log probabilities of some tokens, if they are wanted."""
        if not self.show.logprobs:
            return None
        return ChatLogprobs([
            TokenLogprob(
                *self._entry(token.token_id, token.logprob),
                [TopLogprob(*self._entry(*entry)) for entry in token.top_logprobs],
            )
            for token in tokens
        ])  # fmt: skip

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        text = self._names(token_id)
        return text, finite(logprob), list(text.encode())
