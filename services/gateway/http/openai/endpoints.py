"""The OpenAI endpoints: a request is checked, tokenized and submitted; its answer sends itself."""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from common.seams import Clock
from services.gateway.access.api_keys import Caller
from services.gateway.backend import Backend
from services.gateway.http.openai import params, schema
from services.gateway.http.openai.answer import Answer, View
from services.gateway.http.openai.body import BodyReader
from services.gateway.http.openai.chats import Chats
from services.gateway.http.openai.choices import Choices, Job
from services.gateway.http.openai.completions import CompletionShow, CompletionView
from services.gateway.http.openai.decoding import decode_body
from services.gateway.http.openai.grammars import Grammars
from services.gateway.http.openai.intake import Intake, check_model
from services.gateway.http.openai.logprobs import TokenNames
from services.gateway.http.openai.prompts import parse_prompts
from services.gateway.http.openai.running import Running, Ticket
from services.gateway.http.openai.structured import parse_structure
from services.gateway.http.openai.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from services.gateway.text.model import TextModel


class ModelCard(msgspec.Struct, kw_only=True, frozen=True):
    """A model, as clients list them. `created` is in seconds since 1970."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "kvbaton"
    root: str
    parent: str | None = None
    max_model_len: int | None


class Endpoints:
    """Request handlers. `stopping` ends every answer under way when it is done."""

    def __init__(
        self,
        backend: Backend,
        model: TextModel,
        *,
        clock: Clock,
        intake: Intake,
        chats: Chats,
        grammars: Grammars,
        bodies: BodyReader,
        running: Running,
        stopping: asyncio.Future[None],
    ) -> None:
        self._backend = backend
        self._model = model
        self._clock = clock
        self._stopping = stopping
        self._bodies = bodies
        self._running = running
        self._intake = intake
        self._chats = chats
        self._grammars = grammars
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        received_at = self._clock.now()
        async with self._bodies.open(request) as body:
            rng = self._intake.rng_of(request, body)
            fields = decode_body(body, schema.CompletionRequest)
            self._intake.check(request, body, fields, COMPLETION_FIELDS)
            max_tokens = params.most_tokens(fields)
            drops_output = bool(fields.echo) and max_tokens == 0
            asked = params.prompt_logprobs(fields)
            of_echo = fields.logprobs if fields.echo else None
            sampling = await self._intake.sampling(
                fields,
                max_tokens=1 if drops_output else max_tokens,
                logprobs=fields.logprobs,
                prompt_logprobs=max(
                    (each for each in (asked, of_echo) if each is not None), default=None
                ),
                grammar=await self._grammar(fields),
            )
            prompts = parse_prompts(fields.prompt)
            params.num_choices(fields, len(prompts))  # before any of them is tokenized
            token_ids = await self._intake.tokenized(fields, prompts, max_tokens)
            show = CompletionShow(
                logprobs=fields.logprobs,
                prompt_logprobs=asked,
                echo=self._echo(fields, prompts, token_ids) if fields.echo else (),
                token_ids=bool(fields.return_token_ids),
            )
        job = self._intake.job(
            request,
            fields,
            token_ids,
            sampling,
            rng=rng,
            received_at=received_at,
            drops_output=drops_output,
        )
        choices = self._begin(job)
        return self._answer(
            request, fields, choices, CompletionView(choices, show, self._names(fields))
        )

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        received_at = self._clock.now()
        async with self._bodies.open(request) as body:
            rng = self._intake.rng_of(request, body)
            fields = decode_body(body, schema.ChatRequest)
            self._intake.check(request, body, fields, CHAT_FIELDS)
            chat = await self._chats.read(request, fields, rng=rng, received_at=received_at)
        choices = self._begin(chat.job)
        return self._answer(request, fields, choices, chat.view(choices, self._names(fields)))

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        check_model(self._model, request.path_params["model"])
        return json_response(self._card())

    def _card(self) -> ModelCard:
        name = self._model.name
        return ModelCard(
            id=name, created=self._created, root=name, max_model_len=self._backend.max_model_len
        )

    def _echo(
        self,
        fields: schema.CompletionRequest,
        prompts: list[str] | list[list[int]],
        token_ids: list[list[int]],
    ) -> list[str]:
        """The prompts as texts: as they were given, unless as ids or to be cut."""
        skip = fields.skip_special_tokens is not False
        return [
            given
            if isinstance(given, str) and fields.truncate_prompt_tokens is None
            else self._model.decode(ids, skip_special_tokens=skip)
            for given, ids in zip(prompts, token_ids, strict=True)
        ]

    async def _grammar(self, fields: schema.GenerationFields) -> str:
        source = parse_structure(fields)
        return "" if source is None else await self._grammars.compile(source)

    def _names(self, fields: schema.GenerationFields) -> TokenNames:
        return TokenNames(self._model, as_ids=bool(fields.return_tokens_as_token_ids))

    def _begin(self, job: Job) -> Choices:
        return Choices(job, self._backend, self._model, self._clock)

    def _answer(
        self, request: Request, fields: schema.GenerationFields, choices: Choices, view: View
    ) -> Answer:
        caller: Caller = request.state.caller
        return Answer(
            choices,
            view,
            ticket=Ticket(choices.job.like.request_id, caller.tenant),
            running=self._running,
            model_name=self._model.name,
            stream=(fields.stream_options or schema.StreamOptions()) if fields.stream else None,
            stream_interval=fields.stream_interval or 1,
            stopping=self._stopping,
        )


def json_response(value: object) -> Response:
    """What is not generated."""
    return Response(msgspec.json.encode(value), media_type="application/json")
