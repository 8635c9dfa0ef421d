"""One conversation with a gateway: hello, requests in flight, signs of life. Pure.

Who uses it calls `receive` for each message that arrives and `tick` at a steady interval; encoded
messages leave through `send`. docs/protocol.md says why each step is safe.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from kvbaton.codec import encode
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    error_from_wire,
)
from kvbaton.protocol import (
    HELLO_REQUIRED,
    PROTOCOL_VERSION,
    Accepted,
    AdminAnswer,
    Cancel,
    Done,
    Error,
    GatewayMessage,
    Hello,
    Ping,
    Pong,
    Tokens,
    Welcome,
)
from kvbaton.questions import Answer, Prompt

MAX_SILENT_TICKS = 3

# What a request hears: that it is accepted, its prompt, tokens, then one of the others, which is
# the last.
Event = Accepted | Prompt | Tokens | Done | AdminAnswer | Answer | KvbatonError


@dataclass(slots=True)
class _Request:
    """`raw` is sent at the next welcome while `is_waiting`: the gateway is known not to have it."""

    raw: bytes
    sink: Callable[[Event], None]
    is_waiting: bool


class Session:
    """Ends once, with `error`; what was in flight then fails with it.

    `send(raw)` queues a message and returns False if the queue is full.
    """

    def __init__(self, endpoint: str, send: Callable[[bytes], bool], client: str = "") -> None:
        self.welcome: Welcome | None = None
        self.error: KvbatonError | None = None
        self._endpoint = endpoint
        self._send = send
        self._hello = encode(Hello(protocol_version=PROTOCOL_VERSION, client=client))
        self._is_greeting = False
        self._num_silent_ticks = 0
        self._requests: dict[int, _Request] = {}

    @property
    def is_welcome(self) -> bool:
        """Whether requests can be sent; those made before wait."""
        return self.welcome is not None and self.error is None

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def greet(self) -> None:
        """Say hello. One at a time: a second would make the gateway drop what came between."""
        if not self._is_greeting:
            self._is_greeting = True
            self._send(self._hello)

    def start(self, request_id: int, raw: bytes, sink: Callable[[Event], None]) -> None:
        """Send an encoded request of any kind, now or when the gateway has welcomed us."""
        if self.error is not None:
            sink(copy(self.error))
        else:
            self._requests[request_id] = _Request(raw, sink, is_waiting=True)
            if not self._is_greeting:
                self._send_request(request_id)

    def cancel(self, request_id: int) -> None:
        """Ask for the end of a request. Does nothing once it has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.is_waiting:
            del self._requests[request_id]
            request.sink(CancelledRequestError("the request was cancelled"))
        else:
            self._send(encode(Cancel(id=request_id)))

    def receive(self, message: GatewayMessage) -> None:
        """Take in one message."""
        self._num_silent_ticks = 0
        if isinstance(message, Accepted | Prompt | Tokens):
            request = self._requests.get(message.id)
            if request is not None:
                request.sink(message)
        elif isinstance(message, Error):
            self._on_error(message)
        elif isinstance(message, Welcome):
            self._on_welcome(message)
        elif not isinstance(message, Pong):
            self._finish(message.id, message)
        elif self.welcome is None or message.instance_id != self.welcome.instance_id:
            self.greet()

    def tick(self) -> None:
        """Give a sign of life; end the session of a gateway that has given none for too long."""
        self._num_silent_ticks += 1
        if self._num_silent_ticks >= MAX_SILENT_TICKS:
            self.end(ConnectionLostError(f"no sign of life from the gateway at {self._endpoint}"))
        elif not self._is_greeting:
            self._send(encode(Ping()))

    def close(self) -> None:
        """End the session in order: the gateway frees what is in flight."""
        for request_id in list(self._requests):
            self.cancel(request_id)
        self.end(ConnectionLostError("the client was closed"))

    def end(self, error: KvbatonError) -> None:
        """The connection is lost. Idempotent."""
        if self.error is None:
            self.error = error
            for request_id in list(self._requests):
                self._finish(request_id, copy(error))

    def _send_request(self, request_id: int) -> None:
        request = self._requests[request_id]
        request.is_waiting = False
        if not self._send(request.raw):
            full = OverloadedError(f"the queue to {self._endpoint} is full")
            self._finish(request_id, full)

    def _finish(self, request_id: int, event: Event) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.sink(event)

    def _on_error(self, message: Error) -> None:
        if message.code == HELLO_REQUIRED:
            request = None if message.id is None else self._requests.get(message.id)
            if request is not None:
                request.is_waiting = True
            self.greet()
            return
        error = error_from_wire(message.code, message.message, message.field, message.retry_after_s)
        if message.id is None:
            self.end(error)  # some message of ours was refused, and nobody can say which
        else:
            self._finish(message.id, error)

    def _on_welcome(self, welcome: Welcome) -> None:
        """Answers keep their order: what waits was refused before, the rest is lost."""
        if welcome.protocol_version != PROTOCOL_VERSION:
            self.end(
                ProtocolError(
                    f"the gateway speaks protocol version {welcome.protocol_version}, "
                    f"this client {PROTOCOL_VERSION}"
                )
            )
            return
        self.welcome = welcome
        self._is_greeting = False
        lost = ConnectionLostError(f"the gateway at {self._endpoint} restarted or had forgotten us")
        for request_id, request in list(self._requests.items()):
            if request.is_waiting:
                self._send_request(request_id)
            else:
                self._finish(request_id, copy(lost))
