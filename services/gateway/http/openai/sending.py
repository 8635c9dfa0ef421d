"""An answer's life: it is sent until it ends, its client leaves, or somebody ends it."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvbaton.errors import CancelledRequestError, KvbatonError, UnavailableError
from services.gateway.http.openai.choices import Choices
from services.gateway.http.openai.running import Running, Ticket

# Tokens that have come already, or that nobody is there to read, take no turn of the event loop: a
# long answer would keep the others waiting, and its own end from being noticed.
TOKENS_BETWEEN_TURNS = 32

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class Sender(Response):
    """An ASGI response that owns its choices: they are cancelled when it ends, however it ends.

    A request that fails before its first token raises KvbatonError and so gets a proper status;
    after that the stream itself carries the error. `stopping` is done when the server goes down.
    """

    def __init__(
        self,
        choices: Choices,
        *,
        ticket: Ticket,
        running: Running,
        is_stream: bool,
        stopping: asyncio.Future[None],
    ) -> None:
        self.choices = choices
        self._ticket = ticket
        self._running = running
        self._is_stream = is_stream
        self._stopping = stopping
        self._aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_started = False

    @abstractmethod
    async def send_whole(self, send: Send) -> None:
        """Send it as one object."""

    @abstractmethod
    async def send_stream(self, send: Send) -> None:
        """Send it as events, from `start_stream` on."""

    @abstractmethod
    def failure(self, error: KvbatonError) -> bytes:
        """The end of a stream that has begun and fails."""

    def abort(self) -> None:
        """End it with an error. Idempotent."""
        if not self._aborted.done():
            self._aborted.set_result(None)

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send), name="answer")
        gone = asyncio.create_task(_disconnected(receive), name="disconnect")
        self._running.add(self._ticket, self)
        try:
            ends = (work, gone, self._stopping, self._aborted)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._running.remove(self._ticket, self)
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            await self.choices.close()
        if not work.cancelled():
            work.result()
        elif self._stopping.done():
            await self._fail(send, UnavailableError("the server is shutting down"))
        elif self._aborted.done():
            await self._fail(send, CancelledRequestError("the request was aborted"))

    async def start_stream(self, send: Send) -> None:
        """The head of a stream. From here on the status is that of success."""
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        self.has_started = True

    async def _work(self, send: Send) -> None:
        if not self._is_stream:
            await self.send_whole(send)
            return
        try:
            await self.send_stream(send)
        except KvbatonError as error:
            await self._fail(send, error)

    async def _fail(self, send: Send, error: KvbatonError) -> None:
        if not self.has_started:
            raise error
        await send_body(send, self.failure(error), more=False)


async def send_object(send: Send, value: Any, server_timing: str = "") -> None:
    """A whole JSON answer."""
    body = msgspec.json.encode(value)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if server_timing:
        headers.append((b"server-timing", server_timing.encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send_body(send, body, more=False)


async def send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    """A part of the body, or with `more` false its last."""
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
