"""What a caller holds of a request: its tokens, then how it ended. Both clients build on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Self

from kvbaton.errors import KvbatonError, ProtocolError
from kvbaton.protocol import Done, Timings, Token, Tokens, Usage
from kvbaton.session import Event


class GenerationBase:
    """`finish_reason`, `usage` and `timings` are None until the last token has been read, and
    `request_id`, by which the cluster knows the request, is "".

    The request is cancelled when its handle is dropped, and at the end of a `with` block around it.
    """

    _has_ended = True  # until there is a request to cancel

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None]) -> None:
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.request_id = ""
        self._loop = loop
        self._cancel = cancel
        self._tokens: deque[Token] = deque()
        self._texts: list[str] = []
        self._has_ended = False

    @property
    def text(self) -> str:
        """The text of the tokens read so far."""
        return "".join(self._texts)

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
            self.finish_reason = event.finish_reason
            self.usage = event.usage
            self.timings = event.timings
            self.request_id = event.request_id
        elif isinstance(event, Tokens):
            self._tokens.extend(event.tokens)
        else:
            self._has_ended = True
            raise ProtocolError("the gateway answered what was not asked")

    def _next_token(self) -> Token | None:
        """The next token already received."""
        if not self._tokens:
            return None
        token = self._tokens.popleft()
        self._texts.append(token.text)
        return token
