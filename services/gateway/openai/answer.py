"""Sends the tokens of a request: as one JSON object, or as events while they come (SSE)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvbaton.errors import KvbatonError, UnavailableError
from services.gateway.generation import TextToken
from services.gateway.openai.choices import Choices, Usage
from services.gateway.openai.errors import kvbaton_error_body
from services.gateway.openai.schema import StreamOptions

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]
_DONE = b"data: [DONE]\n\n"
# Tokens that have come already, or that nobody is there to read, take no turn of the event loop: a
# long answer would keep the others waiting, and its own end from being noticed.
_TOKENS_BETWEEN_TURNS = 32


class View(Protocol):
    """The shape of one endpoint's answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int, /) -> msgspec.Struct | None:
        """What a stream says before the first token of a choice."""

    def chunk(self, index: int, token: TextToken) -> msgspec.Struct:
        """One token of a choice."""

    def whole(self, index: int, tokens: Sequence[TextToken]) -> msgspec.Struct:
        """All tokens of a choice."""


class Envelope(msgspec.Struct, kw_only=True):
    """What goes around the choices, whole or in chunks. `created` is in seconds since 1970."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Answer(Response):
    """An ASGI response that owns its choices: they are cancelled when it ends, however it ends.

    A request that fails before its first token raises KvbatonError and so gets a proper status;
    after that the stream itself carries the error. `stopping` is done when the server goes down.
    """

    def __init__(
        self,
        choices: Choices,
        view: View,
        *,
        request_id: str,
        model_name: str,
        stream: StreamOptions | None,
        stopping: asyncio.Future[None],
    ) -> None:
        self._choices = choices
        self._view = view
        self._envelope = Envelope(
            id=view.id_prefix + request_id,
            object=view.whole_object if stream is None else view.chunk_object,
            created=int(time.time()),
            model=model_name,
            choices=[],
        )
        self._stream_options = stream
        self._stopping = stopping
        self._has_started = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send), name="answer")
        gone = asyncio.create_task(_disconnected(receive), name="disconnect")
        try:
            ends = (work, gone, self._stopping)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            await self._choices.close()
        if not work.cancelled():
            work.result()
        elif self._stopping.done():
            await self._fail(send, UnavailableError("the server is shutting down"))

    async def _work(self, send: Send) -> None:
        if self._stream_options is None:
            await self._send_whole(send)
            return
        try:
            await self._send_stream(send, self._stream_options)
        except KvbatonError as error:
            await self._fail(send, error)

    async def _fail(self, send: Send, error: KvbatonError) -> None:
        if not self._has_started:
            raise error
        await _send_body(send, b"data: " + kvbaton_error_body(error) + b"\n\n" + _DONE, more=False)

    async def _send_whole(self, send: Send) -> None:
        tokens: list[list[TextToken]] = [[] for _ in range(len(self._choices))]
        async for index, token in self._choices:
            tokens[index].append(token)
        envelope = self._envelope
        envelope.choices = [self._view.whole(index, part) for index, part in enumerate(tokens)]
        envelope.usage = self._choices.usage()
        body = msgspec.json.encode(envelope)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_body(send, body, more=False)

    async def _send_stream(self, send: Send, options: StreamOptions) -> None:
        envelope, view = self._envelope, self._view
        if options.include_usage:
            envelope.usage = None
        async for index, token in self._choices:
            if not self._has_started:
                start = {"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM}
                await send(start)
                self._has_started = True
            event = b""
            opening = view.opening(index) if token.index == 0 else None
            if opening is not None:
                envelope.choices = [opening]
                event = _event(envelope)
            envelope.choices = [view.chunk(index, token)]
            if options.continuous_usage_stats:
                envelope.usage = self._choices.usage()
            await _send_body(send, event + _event(envelope))
            if token.index % _TOKENS_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        last = b""
        if options.include_usage:
            envelope.choices = []
            envelope.usage = self._choices.usage()
            last = _event(envelope)
        await _send_body(send, last + _DONE, more=False)


def _event(envelope: Envelope) -> bytes:
    return b"data: " + msgspec.json.encode(envelope) + b"\n\n"


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
