"""The handler of POST /v1/responses."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from common.seams import Clock
from kvbaton.errors import InvalidRequestError
from services.gateway.access.api_keys import Caller
from services.gateway.backend import Backend
from services.gateway.http.openai.body import BodyReader
from services.gateway.http.openai.chats import Chats
from services.gateway.http.openai.choices import Choices
from services.gateway.http.openai.decoding import decode_body
from services.gateway.http.openai.intake import Intake
from services.gateway.http.openai.responses.answer import ResponseAnswer
from services.gateway.http.openai.responses.request import (
    ResponsesRequest,
    as_responses_error,
    to_chat,
)
from services.gateway.http.openai.running import Running, Ticket
from services.gateway.http.openai.unsupported import RESPONSES_FIELDS
from services.gateway.text.model import TextModel


class Responses:
    """Answers as to the chat request that says the same. `stopping` ends every answer under way."""

    def __init__(
        self,
        backend: Backend,
        model: TextModel,
        *,
        clock: Clock,
        intake: Intake,
        chats: Chats,
        bodies: BodyReader,
        running: Running,
        stopping: asyncio.Future[None],
    ) -> None:
        self._backend = backend
        self._model = model
        self._clock = clock
        self._intake = intake
        self._chats = chats
        self._bodies = bodies
        self._running = running
        self._stopping = stopping

    async def create(self, request: Request) -> Response:
        """POST /v1/responses."""
        received_at = self._clock.now()
        async with self._bodies.open(request) as body:
            rng = self._intake.rng_of(request, body)
            fields = decode_body(body, ResponsesRequest)
            try:
                self._intake.check(request, body, fields, RESPONSES_FIELDS)
                chat = await self._chats.read(
                    request, to_chat(fields), rng=rng, received_at=received_at
                )
            except InvalidRequestError as error:
                raise as_responses_error(error) from error
        choices = Choices(chat.job, self._backend, self._model, self._clock)
        caller: Caller = request.state.caller
        return ResponseAnswer(
            choices,
            fields,
            chat.tools,
            rng.new_id(),
            ticket=Ticket(chat.job.like.request_id, caller.tenant),
            running=self._running,
            model_name=self._model.name,
            stopping=self._stopping,
        )
