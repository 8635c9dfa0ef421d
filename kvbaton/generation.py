"""What a caller holds of a request: its tokens, then how it ended. Both clients build on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

from kvbaton.conversation import ToolCall
from kvbaton.errors import KvbatonError, ProtocolError
from kvbaton.explanation import Explanation
from kvbaton.protocol import (
    MAX_CHOICES,
    Done,
    FinishedChoice,
    Generate,
    Timings,
    Token,
    Tokens,
    Usage,
)
from kvbaton.questions import Prompt, PromptToken
from kvbaton.session import Event


class Choice:
    """One of the outputs of a request. `finish_reason` is None until the request has ended, and
    where there were tools the `content` is then what the text is without the calls of them."""

    def __init__(self, before: Sequence[PromptToken]) -> None:
        """`before`: the tokens whose text comes first."""
        self.finish_reason: str | None = None
        self.content: str | None = None
        self.tool_calls: list[ToolCall] = []
        self._before = before
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """The text of the tokens read so far; with `echo`, the prompt's comes first."""
        return "".join((*(token.text for token in self._before), *self._texts))

    def add(self, token: Token) -> None:
        """The next token."""
        self._texts.append(token.text)

    def end(self, finished: FinishedChoice) -> None:
        """How it ended."""
        self.finish_reason = finished.finish_reason
        self.content = finished.content
        self.tool_calls = finished.tool_calls


class GenerationBase:
    """`finish_reason`, `usage` and `timings` are None until the last token has been read, and
    `request_id`, by which the cluster knows the request, is "". There are `n` choices; `text`,
    `finish_reason` and `tool_calls` are those of the first. `prompt` has the prompt's tokens where
    `echo` or `prompt_logprobs` asked for them, `explanation` what `explain` asked for.

    The request is cancelled when its handle is dropped, and at the end of a `with` block around it.
    """

    _has_ended = True  # until there is a request to cancel

    def __init__(
        self, message: Generate, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None]
    ) -> None:
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.request_id = ""
        self.prompt: list[PromptToken] = []
        self.explanation: Explanation | None = None
        before = self.prompt if message.echo else []
        # A gateway refuses any other number.
        self.choices = [Choice(before) for _ in range(min(max(message.n, 1), MAX_CHOICES))]
        self._loop = loop
        self._cancel = cancel
        self._tokens: deque[Token] = deque()
        self._has_ended = False

    @property
    def text(self) -> str:
        """The text of the tokens read so far."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why it ended."""
        return self.choices[0].finish_reason

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of tools that the model made."""
        return self.choices[0].tool_calls

    def cancel(self) -> None:
        """Stop the request: reading on raises CancelledRequestError. Callable from any thread."""
        if not self._has_ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the request with it
                self._loop.call_soon_threadsafe(self._cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()

    def _take(self, event: Event) -> None:
        """Take in what the request heard. Raises the error that ended it."""
        if isinstance(event, KvbatonError):
            self._has_ended = True
            raise event
        if isinstance(event, Done):
            self._has_ended = True
            self._end(event)
        elif isinstance(event, Tokens):
            self._tokens.extend(event.tokens)
        elif isinstance(event, Prompt):
            self.prompt.extend(event.tokens)
        else:
            self._has_ended = True
            raise ProtocolError("the gateway answered what was not asked")

    def _end(self, done: Done) -> None:
        self.usage = done.usage
        self.timings = done.timings
        self.request_id = done.request_id
        self.explanation = done.explanation
        only = FinishedChoice(
            finish_reason=done.finish_reason, num_output_tokens=done.usage.num_output_tokens
        )
        finished = done.choices or [only]
        if len(finished) != len(self.choices):
            raise ProtocolError(
                f"{len(self.choices)} choices were asked for, the gateway knows {len(finished)}: "
                "it may be of a former version"
            )
        for choice, end in zip(self.choices, finished, strict=True):
            choice.end(end)

    def _next_token(self) -> Token | None:
        """The next token already received."""
        if not self._tokens:
            return None
        token = self._tokens.popleft()
        self.choices[token.choice].add(token)
        return token
