"""Sends a response: as one object, or as the events of the Responses API."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.types import Send

from kvbaton.errors import KvbatonError
from services.gateway.http.openai.choices import Choices, Usage
from services.gateway.http.openai.responses.items import Event, Items
from services.gateway.http.openai.responses.request import ResponsesRequest, TextFormat
from services.gateway.http.openai.running import Running, Ticket
from services.gateway.http.openai.sending import (
    TOKENS_BETWEEN_TURNS,
    Sender,
    send_body,
    send_object,
)
from services.gateway.http.openai.tools.formats import PlainText
from services.gateway.http.openai.tools.heard import Heard
from services.gateway.http.openai.tools.request import ToolUse
from services.gateway.text.generation import TextToken


class ResponseAnswer(Sender):
    """One choice, shown as the items of a response. `base` makes the ids of items and calls."""

    id_prefix = "resp_"

    def __init__(
        self,
        choices: Choices,
        fields: ResponsesRequest,
        tools: ToolUse | None,
        base: str,
        *,
        ticket: Ticket,
        running: Running,
        model_name: str,
        stopping: asyncio.Future[None],
    ) -> None:
        super().__init__(
            choices,
            ticket=ticket,
            running=running,
            is_stream=bool(fields.stream),
            stopping=stopping,
        )
        self._items = Items(base)
        self._heard = Heard(PlainText(), base) if tools is None else tools.heard(base)
        self._response = _opening(fields, self.id_prefix + ticket.request_id, model_name)
        self._num_events = 0

    async def send_whole(self, send: Send) -> None:
        """The response once it is complete."""
        async for _, token in self.choices:
            self._add(token)
        await send_object(send, self._response)

    async def send_stream(self, send: Send) -> None:
        """An event for each thing that happens, numbered."""
        async for _, token in self.choices:
            opening = b""
            if not self.has_started:
                await self.start_stream(send)
                kinds = ("response.created", "response.in_progress")
                opening = b"".join(map(self._state, kinds))
            events = b"".join(map(self._encode, self._add(token)))
            if token.finish_reason is not None:
                events += self._state(f"response.{self._response['status']}")
            if opening or events:
                is_last = token.finish_reason is not None
                await send_body(send, opening + events, more=not is_last)
            if token.index % TOKENS_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)

    def failure(self, error: KvbatonError) -> bytes:
        """The event of a response that cannot be finished."""
        self._response["status"] = "failed"
        self._response["error"] = {"code": "server_error", "message": error.message}
        return self._state("response.failed")

    def _add(self, token: TextToken) -> list[Event]:
        """What a token adds; the last one completes the response."""
        reason = token.finish_reason
        events = self._items.add(self._heard.add(token.text, is_last=reason is not None))
        if reason is None:
            return events
        response = self._response
        response["status"] = "incomplete" if reason == "length" else "completed"
        if reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        events += self._items.finish(response["status"])
        response["output"] = self._items.output
        response["usage"] = _usage(self.choices.usage())
        return events

    def _state(self, kind: str) -> bytes:
        return self._encode({"type": kind, "response": self._response})

    def _encode(self, event: Event) -> bytes:
        body = msgspec.json.encode({**event, "sequence_number": self._num_events})
        self._num_events += 1
        return f"event: {event['type']}\ndata: ".encode() + body + b"\n\n"


def _opening(fields: ResponsesRequest, response_id: str, model_name: str) -> dict[str, Any]:
    """A response before its first token."""
    wish = fields.text and fields.text.format
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": {},
        "model": model_name,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if fields.temperature is None else fields.temperature,
        "text": {"format": wish or TextFormat("text")},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
