"""The client for programs with an event loop.

from kvbaton import AsyncClient

async with AsyncClient("tcp://127.0.0.1:5555") as client:
    async for token in client.generate("def f(", max_tokens=32):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import Self, Unpack

from kvbaton.connection import Gateway
from kvbaton.generation import GenerationBase
from kvbaton.protocol import PING_INTERVAL_S, Token, Welcome
from kvbaton.request import RequestOptions, encode_request
from kvbaton.session import Event

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
CONNECT_TIMEOUT_S = 5.0


class AsyncGeneration(GenerationBase):
    """The tokens of one request, as an asynchronous iterator.

    Cancelling the task that waits for a token cancels the request.
    """

    def __init__(self, gateway: Gateway, request_id: int, raw: bytes) -> None:
        super().__init__(asyncio.get_running_loop(), partial(gateway.cancel, request_id))
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        gateway.start(request_id, raw, self._events.put_nowait)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        while (token := self._next_token()) is None:
            if self._has_ended:
                raise StopAsyncIteration
            try:
                event = await self._events.get()
            except asyncio.CancelledError:
                self.cancel()
                raise
            self._take(event)
        return token


class AsyncClient:
    """A connection to one gateway, for any number of requests at once.

    A gateway that gives no sign of life, or restarts, fails the requests in flight with
    ConnectionLostError; the next request connects again. Belongs to one event loop.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        ping_interval_s: float = PING_INTERVAL_S,
    ) -> None:
        self._gateway = Gateway(
            endpoint, connect_timeout_s=connect_timeout_s, ping_interval_s=ping_interval_s
        )
        self._request_ids = itertools.count(1)

    async def connect(self) -> Welcome:
        """Connect now, and learn which model is served.

        Raises ConnectionLostError without a welcome in time, ProtocolError if it is refused.
        """
        return await self._gateway.connect()

    def generate(
        self, text: str | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGeneration:
        """Start a request; iterate over what is returned for its tokens.

        A prompt is `text`, `token_ids` or `messages`; kvbaton.request lists all options. Raises
        TypeError for an unknown one, UnprocessableError and TooLargeError for what cannot be sent;
        iteration raises the kvbaton.errors that end the request.
        """
        request_id = next(self._request_ids)
        return AsyncGeneration(self._gateway, request_id, encode_request(request_id, text, options))

    async def close(self) -> None:
        """Cancel what is in flight and close the connection. Idempotent."""
        self._gateway.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
