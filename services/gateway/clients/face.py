"""The msgpack face of the gateway: a ROUTER that speaks kvbaton.protocol with client libraries.

The life of a connection: hello, welcome, any number of requests at once. ZeroMQ never says that a
peer has gone, so a client is forgotten when it cannot be sent to or was silent for too long; what
it had in flight is then cancelled, and its next message is answered by "hello_required". A client
that does not read cannot be sent to once its queue is full or the transport has hung up on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec
import structlog

from common.messages.rights import RIGHTS, violation
from common.net.access import role_of, tenant_of
from common.net.liveness import Liveness
from common.net.refusals import Refusals
from common.service import Seams, Tasks
from kvbaton.codec import MAX_MESSAGE_BYTES, Decoder, encode
from kvbaton.errors import (
    CancelledRequestError,
    InvalidRequestError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    TooLargeError,
    UnavailableError,
)
from kvbaton.protocol import (
    CLIENT_TIMEOUT_S,
    HELLO_REQUIRED,
    MAX_REQUEST_BYTES,
    MAX_REQUESTS_IN_FLIGHT,
    PROTOCOL_VERSION,
    AdminQuestion,
    Cancel,
    ClientMessage,
    Error,
    GatewayMessage,
    Generate,
    Hello,
    Ping,
    Pong,
    Request,
    Welcome,
    client_message_decoder,
)
from services.gateway.access.admin import Admin
from services.gateway.backend import Backend
from services.gateway.clients.plan import Means
from services.gateway.clients.questions import answer_question
from services.gateway.clients.request import answer
from services.gateway.http.openai.grammars import Grammars
from services.gateway.text.model import TextModel

log = structlog.get_logger()

_WATCH_INTERVAL_S = 1.0
_MAX_FRAME_BYTES = 2 * MAX_REQUEST_BYTES  # what is a little too long is refused in words


class _AnyRequest(msgspec.Struct):
    """What a message of the wrong shape may still tell: which request it was about."""

    id: int


class ClientFace:
    """Serves clients from a backend. `tasks` owns every request. The connection of a client that
    reads nothing for `slow_reader_s` is ended.

    Raises common.net.transport.TransportError when `endpoint` cannot be bound.
    """

    def __init__(
        self,
        seams: Seams,
        endpoint: str,
        backend: Backend,
        text: TextModel,
        admin: Admin,
        *,
        tasks: Tasks,
        instance_id: str,
        slow_reader_s: float = 30.0,
    ) -> None:
        self._clock = seams.clock
        self._grammars = Grammars()
        self._means = Means(backend, text, self._grammars, seams.clock, seams.rng)
        self._admin = admin
        self._tasks = tasks
        self._instance_id = instance_id
        self._decoder = client_message_decoder()
        self._request_ids: Decoder[_AnyRequest] = Decoder(_AnyRequest, MAX_REQUEST_BYTES)
        self._clients: dict[bytes, dict[int, asyncio.Task[None]]] = {}  # requests in flight
        self._users: dict[bytes, str] = {}  # who said hello; "" where no keys are used
        self._refusals = Refusals("message")
        self._liveness: Liveness[bytes] = Liveness(CLIENT_TIMEOUT_S)
        self._is_draining = False
        self._socket = seams.transport.router(
            endpoint, self._on_frames, _MAX_FRAME_BYTES, slow_reader_s
        )
        self.endpoint = self._socket.endpoint
        self._watcher = tasks.spawn(self._watch(), "client-liveness")
        log.info("clients_listening", endpoint=self.endpoint)

    @property
    def num_clients(self) -> int:
        """Clients that have said hello and were heard from lately."""
        return len(self._clients)

    def forget_silent(self) -> None:
        """Forget the clients that were not heard from for CLIENT_TIMEOUT_S."""
        for peer in self._liveness.expire(self._clock.now()):
            self._forget(peer, f"silent for {CLIENT_TIMEOUT_S:g} s")

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    def close(self) -> None:
        """Tell every request that it is over, and close the socket. Idempotent."""
        self.drain()
        self._watcher.cancel()
        for peer, requests in list(self._clients.items()):
            for request_id in list(requests):
                self._end(peer, requests, request_id, _shutting_down())
        self._socket.close()
        self._grammars.close()

    # ---- connections ----------------------------------------------------------------------------

    def _on_frames(self, peer: bytes, frames: list[memoryview], user: str) -> None:
        if user != self._users.get(peer, user):
            self._forget(peer, "its routing id is another's now")
        if peer in self._clients:
            self._liveness.heard(peer, self._clock.now())
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message is one frame, got {len(frames)}")
            message = self._decoder.decode(frames[0])
            self._check_right(message, user)
            self._handle(peer, message, user)
        except KvbatonError as error:
            log.warning("client_message_refused", reason=error.message)
            self._send(peer, _error(error, self._request_id(peer, frames)))

    def _check_right(self, message: ClientMessage, user: str) -> None:
        error = violation(RIGHTS["gateway"], role_of(user), message)
        if error is not None:
            self._refusals.add(user=user, reason=error.message)
            raise error

    def _request_id(self, peer: bytes, frames: list[memoryview]) -> int | None:
        """Which request a refused message named; None if the answer would end another one."""
        try:
            (frame,) = frames
            request_id = self._request_ids.decode(frame).id
        except (ProtocolError, ValueError):
            return None
        return None if request_id in self._clients.get(peer, ()) else request_id

    def _handle(self, peer: bytes, message: ClientMessage, user: str) -> None:
        if isinstance(message, Hello):
            self._welcome(peer, message, user)
        elif peer not in self._clients:
            request_id = None if isinstance(message, Ping | Cancel) else message.id
            self._send(peer, Error(code=HELLO_REQUIRED, message="say hello first", id=request_id))
        elif isinstance(message, Ping):
            self._send(peer, Pong(instance_id=self._instance_id))
        elif isinstance(message, Cancel):
            cancelled = CancelledRequestError("the request was cancelled")
            self._end(peer, self._clients[peer], message.id, cancelled)
        else:
            self._start(peer, message)

    def _welcome(self, peer: bytes, hello: Hello, user: str) -> None:
        self._forget(peer, "said hello again")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol version {hello.protocol_version} is not supported, this gateway speaks "
                f"{PROTOCOL_VERSION}",
                field="protocol_version",
            )
        self._clients[peer], self._users[peer] = {}, user
        self._liveness.heard(peer, self._clock.now())
        self._send(
            peer,
            Welcome(
                protocol_version=PROTOCOL_VERSION,
                instance_id=self._instance_id,
                model=self._means.model.name,
                max_model_len=self._means.backend.max_model_len,
            ),
        )

    def _send(self, peer: bytes, message: GatewayMessage) -> None:
        """Raises TooLargeError for what no client would take."""
        raw = encode(message)
        if len(raw) > MAX_MESSAGE_BYTES:
            raise TooLargeError(
                f"the answer has {len(raw)} bytes, a message has at most {MAX_MESSAGE_BYTES}"
            )
        if not self._socket.send(peer, [raw]):
            self._forget(peer, "cannot be sent to")

    def _forget(self, peer: bytes, reason: str) -> None:
        requests = self._clients.pop(peer, None)
        if requests is None:
            return
        del self._users[peer]
        self._liveness.forget(peer)
        log.info("client_gone", reason=reason, num_requests=len(requests))
        for task in requests.values():
            task.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            self.forget_silent()

    # ---- requests -------------------------------------------------------------------------------

    def _start(self, peer: bytes, message: Request) -> None:
        requests = self._clients[peer]
        if self._is_draining:
            raise _shutting_down()
        if message.id in requests:
            raise InvalidRequestError(f"request {message.id} is already in flight", field="id")
        if len(requests) >= MAX_REQUESTS_IN_FLIGHT:
            raise OverloadedError(
                f"a connection has at most {MAX_REQUESTS_IN_FLIGHT} requests in flight",
                retry_after_s=1.0,
            )
        requests[message.id] = self._tasks.spawn(
            self._serve(peer, requests, message.id, self._answers(peer, message)), "client-request"
        )

    def _answers(self, peer: bytes, message: Request) -> AsyncGenerator[GatewayMessage, None]:
        if isinstance(message, AdminQuestion):
            return self._admin.answer(message)
        tenant = tenant_of(self._users[peer])
        if isinstance(message, Generate):
            return answer(message, self._means, tenant)
        return answer_question(message, self._means, tenant)

    async def _serve(
        self,
        peer: bytes,
        requests: dict[int, asyncio.Task[None]],
        request_id: int,
        answers: AsyncGenerator[GatewayMessage, None],
    ) -> None:
        failure: KvbatonError | None = None
        try:
            async with contextlib.aclosing(answers):
                async for part in answers:
                    self._send(peer, part)
        except KvbatonError as error:
            failure = error
        except Exception:
            log.exception("client_request_failed")
            failure = KvbatonError("internal error")
        del requests[request_id]
        if failure is not None:
            self._send(peer, _error(failure, request_id))

    def _end(
        self,
        peer: bytes,
        requests: dict[int, asyncio.Task[None]],
        request_id: int,
        error: KvbatonError,
    ) -> None:
        """End a request from outside; its task says nothing more. Unknown ids are ignored."""
        task = requests.pop(request_id, None)
        if task is not None:
            task.cancel()
            self._send(peer, _error(error, request_id))


def _error(error: KvbatonError, request_id: int | None) -> Error:
    return Error(
        code=error.code,
        message=error.message,
        id=request_id,
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


def _shutting_down() -> UnavailableError:
    return UnavailableError("the gateway is shutting down", retry_after_s=1.0)
