"""The HTTP face of the gateway: routes, request ids, request counts, start and end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from email.utils import formatdate
from importlib.metadata import version

import msgspec
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Counter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.metrics import REGISTRY, exposition
from common.seams import Clock, Rng
from common.service import Tasks
from kvbaton.errors import ForbiddenError, KvbatonError, UnavailableError
from services.gateway.backend import Backend
from services.gateway.http.access import Gate, HttpAccess
from services.gateway.http.debug import DebugRequests
from services.gateway.http.listener import listen, prepare
from services.gateway.http.openai.errors import on_http_error, on_kvbaton_error
from services.gateway.http.openai.grammars import Grammars
from services.gateway.http.openai.operations import DropCache
from services.gateway.http.openai.routes import openai_routes
from services.gateway.http.openapi import openapi
from services.gateway.http.page.files import file_routes
from services.gateway.http.page.live import Live
from services.gateway.http.server import HttpServer
from services.gateway.observe.recent import Recent
from services.gateway.text.model import TextModel

log = structlog.get_logger()

_REQUESTS = Counter(
    "kvbaton_http_requests",
    "HTTP requests by route and status; 499: the client left before the answer",
    ["route", "status"],
    registry=REGISTRY,
)
_MAX_REQUEST_ID_CHARS = 128


class HttpFace:
    """Serves the OpenAI API from a backend.

    Several processes may serve one `port`; port 0 takes a free one, then found in `port`. `tasks`
    owns the server's task. `more_metrics()` is added to /metrics, `recent` is what
    /debug/requests shows; `drop_cache()` serves /reset_prefix_cache. `access` says who is let in;
    without it, everybody is. A client that reads nothing for `slow_reader_s` is cut off.
    An inherited `listener` is served instead of `host` and `port`.
    """

    def __init__(
        self,
        backend: Backend,
        model: TextModel,
        *,
        clock: Clock,
        rng: Rng,
        tasks: Tasks,
        more_metrics: Callable[[], bytes] = bytes,
        recent: Recent | None = None,
        live: Live | None = None,
        drop_cache: DropCache | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        backlog: int = 512,
        access: HttpAccess | None = None,
        slow_reader_s: float = 30.0,
        listener: socket.socket | None = None,
    ) -> None:
        self.port = port
        self._backend = backend
        self._model = model
        self._clock = clock
        self._rng = rng
        self._tasks = tasks
        self._more_metrics = more_metrics
        self._requests = DebugRequests(recent or Recent())
        self._live = [live.route()] if live is not None else []
        self._drop_cache = drop_cache
        self._host = host
        self._backlog = backlog
        self._inherited = listener
        self._access = access or HttpAccess()
        self._slow_reader_s = slow_reader_s
        self._grammars = Grammars()
        self._server: HttpServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stopping: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Bind and serve. Raises OSError, naming the address, when it cannot be bound."""
        if self._inherited is None:
            listener = listen(self._host, self.port, self._backlog)
        else:
            listener = self._inherited
            prepare(listener)
        self._host, self.port = listener.getsockname()[:2]
        self._stopping = asyncio.get_running_loop().create_future()
        routes = openai_routes(
            self._backend,
            self._model,
            self._grammars,
            clock=self._clock,
            rng=self._rng,
            stopping=self._stopping,
            drop_cache=self._drop_cache,
        )
        gate = Gate(self._starlette(routes), self._access.keys, self._clock)
        app = _RequestScope(gate, self._rng)
        self._server = HttpServer(app, self._access.tls, self._slow_reader_s)
        self._serving = self._tasks.spawn(self._serve(self._server, listener), "http")
        log.info("http_listening", host=self._host, port=self.port)

    async def hand_over(self) -> None:
        """Where others may have inherited the socket: accept no more, and return when every
        connection has ended. Elsewhere there is nobody to leave new connections to."""
        if self._server is not None and self._inherited is not None:
            await self._server.hand_over()

    async def close(self) -> None:
        """End every answer with an error and every connection, within a second. Idempotent."""
        if self._server is None or self._stopping is None or self._serving is None:
            return
        if not self._stopping.done():
            self._stopping.set_result(None)
        self._server.stop()
        await asyncio.wait([self._serving])
        self._grammars.close()

    async def _serve(self, server: HttpServer, listener: socket.socket) -> None:
        with listener:
            await server.serve(sockets=[listener])

    def _starlette(self, routes: list[Route]) -> Starlette:
        get = ["GET"]
        app = Starlette(
            routes=[
                *routes,
                Route("/health", _empty, methods=get),
                Route("/ping", _empty, methods=get),
                Route("/ready", self._ready, methods=get),
                Route("/metrics", self._metrics, methods=get),
                Route("/debug/requests", self._requests.show, methods=get),
                Route("/version", _version, methods=get),
                Route("/openapi.json", openapi, methods=get),
                *self._live,
                *file_routes(),
            ],
            exception_handlers={
                KvbatonError: on_kvbaton_error,
                HTTPException: on_http_error,
                ClientDisconnect: _on_disconnect,
                Exception: _on_failure,
            },
        )
        app.router.redirect_slashes = False
        return app

    async def _ready(self, _request: Request) -> Response:
        if not self._backend.ready:
            raise UnavailableError("no worker of every needed role is alive")
        return Response()

    async def _metrics(self, request: Request) -> Response:
        if not request.state.caller.is_operator:
            raise ForbiddenError("metrics tell about all tenants: this needs an operator's key")
        return Response(self.metrics(), media_type=CONTENT_TYPE_LATEST)

    def metrics(self) -> bytes:
        """What /metrics shows."""
        lines = [exposition()]
        for key, value in self._backend.stats().items():
            name = f"kvbaton_gateway_{key}"
            lines.append(f"# TYPE {name} gauge\n{name} {value}\n".encode())
        lines.append(self._more_metrics())
        return b"".join(lines)


class _RequestScope:
    """What surrounds every request: its id and date on the answer, its count, its failure."""

    def __init__(self, app: ASGIApp, rng: Rng) -> None:
        self._app = app
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["request_id"] = _request_id(scope) or self._rng.new_id()
        status = 499
        is_whole = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                date = formatdate(usegmt=True).encode()
                shown_id = scope["state"]["request_id"].encode()
                extra = [(b"date", date), (b"x-request-id", shown_id)]
                message["headers"] = [*message["headers"], *extra]
            await send(message)
            is_whole = not message.get("more_body", True)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("http_request_failed", request=scope["state"]["request_id"])
            if not is_whole:
                raise  # too late for words: the connection is closed on an unfinished answer
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "unknown"
            _REQUESTS.labels(path, status).inc()


def _request_id(scope: Scope) -> str | None:
    """The client's own id, if it gave one that is safe to print."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            is_sane = given.isascii() and given.isprintable()
            return given if is_sane and 1 <= len(given) <= _MAX_REQUEST_ID_CHARS else None
    return None


async def _empty(_request: Request) -> Response:
    return Response()


async def _version(_request: Request) -> Response:
    body = msgspec.json.encode({"version": version("kvbaton")})
    return Response(body, media_type="application/json")


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client left while it sent its request: nobody reads this answer."""
    return Response(status_code=499)


async def _on_failure(request: Request, _error: Exception) -> Response:
    return await on_kvbaton_error(request, KvbatonError("internal error"))
