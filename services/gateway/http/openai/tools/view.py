"""The answers of /v1/chat/completions in which tools may be called."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.gateway.http.openai.chat import (
    AnswerMessage,
    ChatShow,
    ChatView,
    FunctionCall,
    ToolCall,
)
from services.gateway.http.openai.choices import Choices
from services.gateway.http.openai.logprobs import TokenNames
from services.gateway.http.openai.tools.heard import Heard, Piece
from services.gateway.http.openai.tools.request import ToolUse
from services.gateway.text.generation import TextToken


class ToolView(ChatView):
    """Shows the calls in an answer as such, and the rest as its content."""

    def __init__(
        self, choices: Choices, show: ChatShow, names: TokenNames, use: ToolUse, id_base: str
    ) -> None:
        super().__init__(choices, show, names)
        self._use = use
        self._id_base = id_base
        self._heard: dict[int, Heard] = {}

    def delta(self, index: int, tokens: Sequence[TextToken], /) -> AnswerMessage:
        heard = self._heard.setdefault(index, self._listen(index))
        piece = _hear(heard, tokens)
        calls = [
            ToolCall(
                function=FunctionCall(call.arguments, call.name or msgspec.UNSET),
                id=call.id or msgspec.UNSET,
                type="function" if call.id else msgspec.UNSET,
                index=call.index,
            )
            for call in piece.calls
        ]
        return AnswerMessage(piece.content or msgspec.UNSET, tool_calls=calls or msgspec.UNSET)

    def message(self, index: int, tokens: Sequence[TextToken], /) -> AnswerMessage:
        heard = self._heard[index] = self._listen(index)
        piece = _hear(heard, tokens)
        calls = [
            ToolCall(FunctionCall(call.arguments, call.name), call.id, "function")
            for call in piece.calls
        ]
        content = self.show.echo + piece.content
        return AnswerMessage(content or None, "assistant", calls or msgspec.UNSET)

    def reason(self, index: int, token: TextToken, /) -> str | None:
        """A call that the client itself has named ends with "stop", as at OpenAI and in vLLM."""
        ends_with_call = token.finish_reason == "stop" and self._heard[index].num_calls
        return "tool_calls" if ends_with_call and not self._use.named else token.finish_reason

    def _listen(self, index: int) -> Heard:
        return self._use.heard(f"{self._id_base}/{index}")


def _hear(heard: Heard, tokens: Sequence[TextToken]) -> Piece:
    text = "".join(token.text for token in tokens)
    return heard.add(text, is_last=tokens[-1].finish_reason is not None)
