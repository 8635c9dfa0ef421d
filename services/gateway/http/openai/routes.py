"""Every path of the OpenAI API, and those that servers of its kind have beside it."""

from __future__ import annotations

import asyncio

from starlette.routing import Route

from common.seams import Clock, Rng
from services.gateway.backend import Backend
from services.gateway.http.openai.body import BodyReader
from services.gateway.http.openai.chats import Chats
from services.gateway.http.openai.endpoints import Endpoints
from services.gateway.http.openai.grammars import Grammars
from services.gateway.http.openai.intake import Intake
from services.gateway.http.openai.operations import DropCache, Operations
from services.gateway.http.openai.responses.endpoint import Responses
from services.gateway.http.openai.running import Running
from services.gateway.http.openai.tokenization import Tokenization
from services.gateway.text.model import TextModel


def openai_routes(
    backend: Backend,
    model: TextModel,
    grammars: Grammars,
    *,
    clock: Clock,
    rng: Rng,
    stopping: asyncio.Future[None],
    drop_cache: DropCache | None,
) -> list[Route]:
    """`stopping` ends every answer under way when it is done."""
    bodies, running = BodyReader(), Running()
    intake = Intake(backend, model, clock, rng)
    chats = Chats(intake, model, grammars)
    endpoints = Endpoints(
        backend,
        model,
        clock=clock,
        intake=intake,
        chats=chats,
        grammars=grammars,
        bodies=bodies,
        running=running,
        stopping=stopping,
    )
    responses = Responses(
        backend,
        model,
        clock=clock,
        intake=intake,
        chats=chats,
        bodies=bodies,
        running=running,
        stopping=stopping,
    )
    tokenization = Tokenization(backend, model, bodies)
    operations = Operations(backend, model, bodies, running, drop_cache)
    posts = {
        "/v1/completions": endpoints.completions,
        "/v1/chat/completions": endpoints.chat_completions,
        "/v1/responses": responses.create,
        "/v1/embeddings": operations.embeddings,
        "/tokenize": tokenization.tokenize,
        "/detokenize": tokenization.detokenize,
        "/abort_requests": operations.abort_requests,
        "/abort_request": operations.abort_request,
        "/reset_prefix_cache": operations.reset_cache,
        "/flush_cache": operations.reset_cache,
        "/start_profile": operations.profile,
        "/stop_profile": operations.profile,
    }
    gets = {
        "/v1/models": endpoints.models,
        "/v1/models/{model:path}": endpoints.model,
        "/load": operations.load,
        "/server_info": operations.server_info,
        "/health_generate": operations.health_generate,
    }
    return [
        *(Route(path, handler, methods=["POST"]) for path, handler in posts.items()),
        *(Route(path, handler, methods=["GET"]) for path, handler in gets.items()),
    ]
