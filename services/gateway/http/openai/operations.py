"""What operators and routers ask beside generation, by the names of vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvbaton.errors import (
    ForbiddenError,
    InvalidRequestError,
    KvbatonError,
    NotSupportedError,
    UnavailableError,
)
from kvbaton.sampling import SamplingParams
from services.gateway.access.api_keys import Caller
from services.gateway.backend import Backend, GenerationRequest
from services.gateway.http.openai.body import BodyReader
from services.gateway.http.openai.chat import ChatView
from services.gateway.http.openai.completions import CompletionView
from services.gateway.http.openai.decoding import decode_body
from services.gateway.http.openai.endpoints import json_response
from services.gateway.http.openai.responses.answer import ResponseAnswer
from services.gateway.http.openai.running import Running
from services.gateway.text.model import TextModel

MAX_ABORTED = 1024

DropCache = Callable[[], Awaitable[int]]

_PROBE_S = 20.0  # SGLang's patience
_ANSWER_PREFIXES = (ChatView.id_prefix, CompletionView.id_prefix, ResponseAnswer.id_prefix)


class AbortRequests(msgspec.Struct, frozen=True):
    """POST /abort_requests, as vLLM has it."""

    request_ids: list[str]


class AbortRequest(msgspec.Struct, frozen=True):
    """POST /abort_request, as SGLang has it."""

    rid: str = ""
    abort_all: bool = False


class Operations:
    """Request handlers."""

    def __init__(
        self,
        backend: Backend,
        model: TextModel,
        bodies: BodyReader,
        running: Running,
        drop_cache: DropCache | None,
    ) -> None:
        """`drop_cache` None: that cannot be done here."""
        self._backend = backend
        self._model = model
        self._bodies = bodies
        self._running = running
        self._drop_cache = drop_cache

    async def load(self, _request: Request) -> Response:
        """GET /load: the answers under way at this gateway."""
        return json_response({"server_load": self._running.num_answers})

    async def server_info(self, request: Request) -> Response:
        """GET /server_info."""
        check_operator(request)
        info = {
            "version": version("kvbaton"),
            "model": self._model.name,
            "max_model_len": self._backend.max_model_len,
            "vocab_size": self._model.vocab_size,
            "ready": self._backend.ready,
            "server_load": self._running.num_answers,
            "stats": self._backend.stats(),
        }
        return json_response(info)

    async def health_generate(self, request: Request) -> Response:
        """GET /health_generate: 200 once a token was really made."""
        caller: Caller = request.state.caller
        try:
            stream = self._backend.submit(
                GenerationRequest(
                    request_id=request.state.request_id,
                    prompt=[0],
                    sampling=SamplingParams(max_tokens=1, temperature=0, seed=0),
                    tenant=caller.cache_tenant,
                    deadline_s=_PROBE_S,
                )
            )
            try:
                await anext(aiter(stream))
            finally:
                stream.cancel()
        except KvbatonError as error:
            raise UnavailableError(f"no token could be made: {error.message}") from error
        return Response()

    async def abort_requests(self, request: Request) -> Response:
        """POST /abort_requests."""
        async with self._bodies.open(request) as body:
            request_ids = decode_body(body, AbortRequests).request_ids
        if len(request_ids) > MAX_ABORTED:
            raise InvalidRequestError(
                f"request_ids holds at most {MAX_ABORTED} ids, got {len(request_ids)}",
                field="request_ids",
            )
        return self._abort(request, request_ids)

    async def abort_request(self, request: Request) -> Response:
        """POST /abort_request."""
        async with self._bodies.open(request) as body:
            fields = decode_body(body, AbortRequest)
        if not fields.abort_all and not fields.rid:
            raise InvalidRequestError("rid is empty, and abort_all is not true", field="rid")
        return self._abort(request, None if fields.abort_all else [fields.rid])

    def _abort(self, request: Request, request_ids: list[str] | None) -> Response:
        """Everybody may end what is their tenant's, operators anything."""
        caller: Caller = request.state.caller
        tenant = None if caller.is_operator else caller.tenant
        if request_ids is not None:
            request_ids = [_bare(each) for each in request_ids]
        return json_response({"num_aborted": self._running.abort(request_ids, tenant)})

    async def reset_cache(self, request: Request) -> Response:
        """POST /reset_prefix_cache, /flush_cache."""
        check_operator(request)
        _check_origin(request)
        if self._drop_cache is None:
            raise NotSupportedError("this server cannot drop what is cached")
        return json_response({"num_blocks": await self._drop_cache()})

    async def profile(self, request: Request) -> Response:
        """POST /start_profile, /stop_profile."""
        check_operator(request)
        raise NotSupportedError("this server has no profiler")

    async def embeddings(self, _request: Request) -> Response:
        """POST /v1/embeddings."""
        raise NotSupportedError("this server has no embeddings")


def check_operator(request: Request) -> None:
    """Raise ForbiddenError for other callers."""
    caller: Caller = request.state.caller
    if not caller.is_operator:
        raise ForbiddenError("this is about all tenants: it needs an operator's key")


def _check_origin(request: Request) -> None:
    """A web page can post without a body to another's server: no more than that."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ForbiddenError("this is not for other servers' web pages")


def _bare(request_id: str) -> str:
    """Clients know the id of an answer, which has the kind of the answer before it."""
    for prefix in _ANSWER_PREFIXES:
        request_id = request_id.removeprefix(prefix)
    return request_id
