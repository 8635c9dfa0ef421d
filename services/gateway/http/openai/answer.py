"""Sends the tokens of a request: as one JSON object, or as events while they come (SSE)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from kvbaton.errors import KvbatonError
from services.gateway.backend import Timeline
from services.gateway.http.openai.choices import Choices, Usage, best
from services.gateway.http.openai.errors import kvbaton_error_body
from services.gateway.http.openai.running import Running, Ticket
from services.gateway.http.openai.schema import StreamOptions
from services.gateway.http.openai.sending import (
    TOKENS_BETWEEN_TURNS,
    Sender,
    send_body,
    send_object,
)
from services.gateway.observe.explain import server_timing
from services.gateway.text.generation import TextToken

_DONE = b"data: [DONE]\n\n"


class View(Protocol):
    """The shape of one endpoint's answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def head(self, envelope: Envelope, /) -> None:
        """Put beside the choices what there is to say once: a stream's first event has it."""

    def opening(self, index: int, /) -> msgspec.Struct | None:
        """What a stream says before the first token of a choice."""

    def chunk(self, index: int, tokens: Sequence[TextToken], /) -> msgspec.Struct:
        """The next tokens of a choice, most often one."""

    def whole(self, index: int, tokens: Sequence[TextToken], /) -> msgspec.Struct:
        """All tokens of a choice."""


class Metrics(msgspec.Struct, kw_only=True, frozen=True):
    """How long parts of a request took; benchmark clients read them."""

    queue_time_ms: float
    time_to_first_token_ms: float
    kv_transfer_ms: float


class Envelope(msgspec.Struct, kw_only=True):
    """What goes around the choices, whole or in chunks. `created` is in seconds since 1970."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    metrics: Metrics | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET
    kvbaton: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET  # what only we have


class Answer(Sender):
    """Choices in an envelope, as their view shows them."""

    def __init__(
        self,
        choices: Choices,
        view: View,
        *,
        ticket: Ticket,
        running: Running,
        model_name: str,
        stream: StreamOptions | None,
        stream_interval: int,
        stopping: asyncio.Future[None],
    ) -> None:
        """`stream` None: as one object. `stream_interval`: tokens of a choice in one event."""
        is_stream = stream is not None
        super().__init__(
            choices, ticket=ticket, running=running, is_stream=is_stream, stopping=stopping
        )
        self._view = view
        self._envelope = Envelope(
            id=view.id_prefix + ticket.request_id,
            object=view.chunk_object if is_stream else view.whole_object,
            created=int(time.time()),
            model=model_name,
            choices=[],
        )
        self._options = stream or StreamOptions()
        self._stream_interval = stream_interval

    def failure(self, error: KvbatonError) -> bytes:
        """As OpenAI's clients find it."""
        return b"data: " + kvbaton_error_body(error) + b"\n\n" + _DONE

    async def send_whole(self, send: Send) -> None:
        """All choices at once."""
        outputs: list[list[TextToken]] = [[] for _ in range(len(self.choices))]
        async for index, token in self.choices:
            outputs[index].append(token)
        envelope, view = self._envelope, self._view
        outputs = best(self.choices.job, outputs)
        envelope.choices = [view.whole(index, tokens) for index, tokens in enumerate(outputs)]
        envelope.usage = self.choices.usage()
        view.head(envelope)
        await send_object(send, envelope, self._explain())

    async def send_stream(self, send: Send) -> None:
        """A choice's tokens as they come, and the usage at the end."""
        envelope, options = self._envelope, self._options
        if options.include_usage:
            envelope.usage = None
        waiting: list[list[TextToken]] = [[] for _ in range(len(self.choices))]
        async for index, token in self.choices:
            tokens = waiting[index]
            tokens.append(token)
            is_due = token.index == 0 or token.finish_reason is not None
            if is_due or len(tokens) >= self._stream_interval:
                if options.continuous_usage_stats:
                    envelope.usage = self.choices.usage()
                if options.include_worker:
                    envelope.kvbaton = {"worker": token.worker}
                await self._send_chunk(send, index, tokens)
                tokens.clear()
            if token.index % TOKENS_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        last = b""
        envelope.kvbaton = msgspec.UNSET
        self._explain()
        if options.include_usage:
            envelope.usage = self.choices.usage()
            envelope.metrics = _metrics(self.choices.timeline)
        if options.include_usage or self.choices.job.is_explained:
            envelope.choices = []
            last = _event(envelope)
        await send_body(send, last + _DONE, more=False)

    def _explain(self) -> str:
        """How it came about, if that is wanted: in the envelope, and for a header."""
        if not self.choices.job.is_explained:
            return ""
        explanations = self.choices.explanations()
        self._envelope.kvbaton = {"explanations": explanations}
        return server_timing(explanations[0])

    async def _send_chunk(self, send: Send, index: int, tokens: list[TextToken]) -> None:
        envelope, view = self._envelope, self._view
        events = []
        opening = view.opening(index) if tokens[0].index == 0 else None
        for choice in (opening, view.chunk(index, tokens)):
            if choice is None:
                continue
            envelope.choices = [choice]
            if not self.has_started:
                view.head(envelope)
                await self.start_stream(send)
            events.append(_event(envelope))
            envelope.prompt_token_ids = envelope.prompt_logprobs = msgspec.UNSET
        await send_body(send, b"".join(events))


def _metrics(timeline: Timeline) -> Metrics:
    """What did not happen, such as a transfer in a colocated cluster, took no time."""

    def passed_ms(begin: float, end: float) -> float:
        return round(max(0.0, end - begin) * 1000, 3) if begin and end else 0.0

    return Metrics(
        queue_time_ms=passed_ms(timeline.received_at, timeline.placed_at),
        time_to_first_token_ms=passed_ms(timeline.received_at, timeline.first_token_at),
        kv_transfer_ms=passed_ms(timeline.prefilled_at, timeline.handed_over_at),
    )


def _event(envelope: Envelope) -> bytes:
    return b"data: " + msgspec.json.encode(envelope) + b"\n\n"
