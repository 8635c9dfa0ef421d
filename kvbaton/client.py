"""The client for programs with an event loop.

from kvbaton import AsyncClient

async with AsyncClient("tcp://127.0.0.1:5555") as client:
    async for token in client.generate("def f(", max_tokens=32):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self, Unpack

from kvbaton.asking import Questions
from kvbaton.gateways import Gateways
from kvbaton.generation import GenerationBase
from kvbaton.keys import client_curve
from kvbaton.protocol import PING_INTERVAL_S, Generate, Token, Welcome
from kvbaton.request import RequestOptions, make_request
from kvbaton.resume import RESUME_S, ResumableRequest
from kvbaton.session import Event

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
CONNECT_TIMEOUT_S = 5.0


class AsyncGeneration(GenerationBase):
    """The tokens of one request, as an asynchronous iterator.

    Cancelling the task that waits for a token cancels the request.
    """

    def __init__(self, gateways: Gateways, message: Generate) -> None:
        events: asyncio.Queue[Event] = asyncio.Queue()
        request = ResumableRequest(message, events.put_nowait)
        cancel = partial(gateways.cancel, request.id)
        super().__init__(message, asyncio.get_running_loop(), cancel)
        self._events = events
        gateways.start(request)

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

    async def finish(self) -> Self:
        """Read to the end."""
        async for _ in self:
            pass
        return self


class AsyncClient(Questions):
    """Connections to one or more gateways, for any number of requests at once.

    Where a gateway ends, restarts, gives no sign of life or is not ready, its requests go on at
    another, or at the same when it is back, after the tokens they have. One that finds no gateway
    for `resume_s`, or for `connect_timeout_s` before there ever was one, raises ConnectionLostError
    or the gateway's reason. `keys` is a client's key file or the folder that it is in; "" connects
    without, None as KVBATON_KEYS says. Belongs to one event loop.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        keys: Path | str | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        ping_interval_s: float = PING_INTERVAL_S,
        resume_s: float = RESUME_S,
    ) -> None:
        gateways = Gateways(
            endpoints,
            curve=client_curve(keys),
            connect_timeout_s=connect_timeout_s,
            ping_interval_s=ping_interval_s,
            resume_s=resume_s,
        )
        super().__init__(gateways, itertools.count(1))

    async def connect(self) -> Welcome:
        """Connect now, and learn which model is served.

        Raises ConnectionLostError without a welcome in time, ProtocolError if it is refused.
        """
        return await self._gateways.connect()

    def generate(
        self, text: str | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGeneration:
        """Start a request; iterate over what is returned for its tokens, or `finish` it.

        A prompt is `text`, `token_ids` or `messages`; kvbaton.request lists all options. Raises
        TypeError for an unknown one, UnprocessableError and TooLargeError for what cannot be sent;
        iteration raises the kvbaton.errors that end the request.
        """
        message = make_request(next(self._request_ids), text, options)
        return AsyncGeneration(self._gateways, message)

    async def close(self) -> None:
        """Cancel what is in flight and close the connections. Idempotent."""
        self._gateways.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
