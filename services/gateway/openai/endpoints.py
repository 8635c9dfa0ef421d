"""The OpenAI endpoints: a request is checked, tokenized and submitted; its answer sends itself."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from common.seams import Clock, Rng
from kvbaton.errors import InvalidRequestError, NotFoundError
from kvbaton.sampling import SamplingParams
from services.gateway.api_keys import Caller
from services.gateway.backend import Backend
from services.gateway.generation import check_cache_salt, check_prompt, check_stop, tokenize
from services.gateway.idempotency import HEADER as IDEMPOTENCY_KEY
from services.gateway.idempotency import DerivedRng, read_key
from services.gateway.openai import schema
from services.gateway.openai.answer import Answer, View
from services.gateway.openai.body import BodyReader
from services.gateway.openai.chat import ChatView
from services.gateway.openai.choices import Choices, Job
from services.gateway.openai.completions import CompletionView
from services.gateway.openai.unsupported import CHAT_FIELDS, COMPLETION_FIELDS, UnsupportedFields
from services.gateway.quotas import Charge, over_quota
from services.gateway.text import TextModel

log = structlog.get_logger()

T = TypeVar("T")

_DEFAULT_COMPLETION_TOKENS = 16
# Names are looked for in requests of ordinary size only: a list of millions would cost memory.
_MAX_BYTES_SEARCHED = 64 * 1024
_MAX_UNKNOWN_FIELDS = 256
_MAX_NAME_CHARS = 64


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
        rng: Rng,
        stopping: asyncio.Future[None],
    ) -> None:
        self._backend = backend
        self._model = model
        self._clock = clock
        self._rng = rng
        self._stopping = stopping
        self._bodies = BodyReader()
        self._unknown_fields: set[str] = set()
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        received_at = self._clock.now()
        async with self._bodies.open(request) as body:
            rng = self._rng_of(request, body)
            fields = schema.decode_body(body, schema.CompletionRequest)
            self._check(body, fields, COMPLETION_FIELDS)
            sampling = schema.sampling_params(
                fields,
                max_tokens=_first(fields.max_tokens, _DEFAULT_COMPLETION_TOKENS),
                logprobs=fields.logprobs,
            )
            prompts = schema.parse_prompts(fields.prompt)
            schema.check_num_choices(len(prompts), _first(fields.n, 1))
            is_special = _first(fields.add_special_tokens, True)
            num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
            token_ids = await tokenize(
                num_chars, lambda: [self._encode(prompt, is_special) for prompt in prompts]
            )
        job = self._job(request, fields, token_ids, sampling, rng=rng, received_at=received_at)
        view = CompletionView(
            self._model, len(prompts) * job.n, with_logprobs=sampling.logprobs is not None
        )
        return self._answer(job, fields, view)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        received_at = self._clock.now()
        async with self._bodies.open(request) as body:
            rng = self._rng_of(request, body)
            fields = schema.decode_body(body, schema.ChatRequest)
            self._check(body, fields, CHAT_FIELDS)
            sampling = schema.sampling_params(
                fields,
                max_tokens=_first(fields.max_completion_tokens, fields.max_tokens),
                logprobs=schema.chat_logprobs(fields),
            )
            schema.check_num_choices(1, _first(fields.n, 1))
            messages = schema.parse_messages(fields.messages)
            prompt = await self._model.chat(messages, most_tokens=self._backend.max_model_len)
            self._check_prompt(prompt, "messages")
        job = self._job(request, fields, [prompt], sampling, rng=rng, received_at=received_at)
        view = ChatView(self._model, with_logprobs=sampling.logprobs is not None)
        return self._answer(job, fields, view)

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._check_model(request.path_params["model"])
        return _json(self._card())

    def _card(self) -> ModelCard:
        name = self._model.name
        return ModelCard(
            id=name, created=self._created, root=name, max_model_len=self._backend.max_model_len
        )

    def _check(
        self, body: bytes, fields: schema.GenerationFields, unsupported: UnsupportedFields
    ) -> None:
        """Everything that needs neither the prompt nor the backend."""
        self._log_unknown(body, fields, unsupported)
        unsupported.check(body)
        if fields.model:
            self._check_model(fields.model)
        check_stop(schema.stop_strings(fields))
        for token_id in fields.stop_token_ids or ():
            if not 0 <= token_id < self._model.vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids has token id {token_id}, the model's are 0 to "
                    f"{self._model.vocab_size - 1}",
                    field="stop_token_ids",
                )
        schema.check_stream_options(fields)

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise NotFoundError(
                f"there is no model {name[:_MAX_NAME_CHARS]!r} here, only {self._model.name!r}",
                field="model",
            )

    def _log_unknown(
        self, body: bytes, fields: schema.GenerationFields, unsupported: UnsupportedFields
    ) -> None:
        """One line for each name of a field that nobody reads, the first time it comes."""
        if len(body) > _MAX_BYTES_SEARCHED:
            return
        names = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()
        known = unsupported.names | schema.IGNORED_FIELDS
        for name in names - known - set(fields.__struct_fields__) - self._unknown_fields:
            if len(self._unknown_fields) < _MAX_UNKNOWN_FIELDS and len(name) <= _MAX_NAME_CHARS:
                self._unknown_fields.add(name)
                log.warning("unknown_field_ignored", field=name)

    def _encode(self, prompt: str | list[int], is_special: bool) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._model.encode(
                prompt, add_special_tokens=is_special, most_tokens=self._backend.max_model_len
            )
        self._check_prompt(prompt, "prompt")  # before the next one is tokenized
        return prompt

    def _check_prompt(self, prompt: list[int], field: str) -> None:
        check_prompt(prompt, self._model.vocab_size, self._backend.max_model_len, field=field)

    def _job(
        self,
        request: Request,
        fields: schema.GenerationFields,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        rng: Rng,
        received_at: float,
    ) -> Job:
        n = _first(fields.n, 1)
        cache_salt = check_cache_salt(fields.cache_salt)
        caller: Caller = request.state.caller
        return Job(
            request_id=request.state.request_id,
            prompts=prompts,
            n=n,
            sampling=sampling,
            stop=schema.stop_strings(fields),
            skip_special_tokens=_first(fields.skip_special_tokens, True),
            cache_salt=cache_salt,
            cache_tenant=caller.cache_tenant,
            charge=self._charge(caller, prompts, n, sampling),
            rng=rng,
            received_at=received_at,
        )

    def _rng_of(self, request: Request, body: bytes) -> Rng:
        """Where the request's seeds come from. With an Idempotency-Key its id does too."""
        key = read_key(request.headers.getlist(IDEMPOTENCY_KEY))
        if key is None:
            return self._rng
        caller: Caller = request.state.caller
        rng = DerivedRng(tenant=caller.tenant, key=key, model=self._model.name, body=body)
        request.state.request_id = rng.new_id()
        return rng

    def _charge(
        self, caller: Caller, prompts: list[list[int]], n: int, sampling: SamplingParams
    ) -> Charge:
        """Sets aside the most tokens that the request can use. Raises OverloadedError."""
        num_tokens = 0
        for prompt in prompts:
            room = (self._backend.max_model_len or len(prompt)) - len(prompt)
            num_tokens += len(prompt) + n * min(room, _first(sampling.max_tokens, room))
        refusal = caller.quota.take_tokens(num_tokens, self._clock.now())
        if refusal is not None:
            raise over_quota(refusal)
        return Charge(caller.quota, num_tokens)

    def _answer(self, job: Job, fields: schema.GenerationFields, view: View) -> Answer:
        return Answer(
            Choices(job, self._backend, self._model, self._clock),
            view,
            request_id=job.request_id,
            model_name=self._model.name,
            stream=(fields.stream_options or schema.StreamOptions()) if fields.stream else None,
            stopping=self._stopping,
        )


def _first(value: T | None, default: T) -> T:
    """The value, or the default where the client gave none."""
    return default if value is None else value


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
