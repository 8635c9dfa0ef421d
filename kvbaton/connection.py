"""The thin shell around sessions with a gateway: a DEALER, timers, another one after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from kvbaton.backoff import backoff_s
from kvbaton.errors import ConnectionLostError, ForbiddenError, KvbatonError, ProtocolError
from kvbaton.protocol import gateway_message_decoder
from kvbaton.session import Session
from kvbaton.sockets import Curve, EventSocket, reason

CLIENT_NAME = "kvbaton-python"
LINGER_MS = 100  # what closing may cost where the gateway does not take our last words
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Connection:
    """Connects and says hello at once. When the session ends, the socket closes with it.

    `on_change` is called then, and when the gateway has said welcome.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        curve: Curve | None,
        ping_interval_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self._endpoint = endpoint
        self._ping_interval_s = ping_interval_s
        self._on_change = on_change
        self._decoder = gateway_message_decoder()
        self._socket = EventSocket(context, zmq.DEALER, self._on_frames, linger_ms=LINGER_MS)
        try:
            if curve is not None:
                self._socket.secure(curve)
            self._socket.watch(_EVENTS, self._on_event)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConnectionLostError(f"cannot connect to {endpoint}: {reason(error)}") from error
        self.session = Session(endpoint, lambda raw: self._socket.send([raw]), CLIENT_NAME)
        self.session.greet()
        self._was_welcome = False
        self._timer = asyncio.get_running_loop().call_later(ping_interval_s, self._tick)

    def close(self) -> None:
        """Cancel what is in flight and close the socket. Idempotent."""
        self.session.close()
        self._settle()

    def _on_frames(self, frames: list[memoryview]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message is one frame, the gateway sent {len(frames)}")
            self.session.receive(self._decoder.decode(frames[0]))
        except KvbatonError as error:
            self.session.end(error)
        self._settle()

    def _on_event(self, event: int) -> None:
        error: KvbatonError = ConnectionLostError(f"the connection to {self._endpoint} ended")
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            error = ForbiddenError(f"{self._endpoint} does not know this client's key")
        elif event != zmq.EVENT_DISCONNECTED:
            error = ConnectionLostError(
                f"the handshake with {self._endpoint} failed (both must use keys of one cluster, "
                "or none)"
            )
        self.session.end(error)
        self._settle()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._ping_interval_s, self._tick)
        self.session.tick()
        self._settle()

    def _settle(self) -> None:
        """Act on what the session has become."""
        if self.session.error is not None:
            if self._timer.cancelled():
                return
            self._timer.cancel()
            self._socket.close()
        elif self._was_welcome or not self.session.is_welcome:
            return
        self._was_welcome = True
        self._on_change()


class Gateway:
    """One gateway: from `connect` to `close` there is a connection, or another one soon.

    `on_change` is called when it is welcome there, and when a connection has ended. Belongs to one
    event loop.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        curve: Curve | None,
        ping_interval_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.error: KvbatonError | None = None  # how the last connection ended; None: welcome since
        self.avoided_until = 0.0  # there are better ones for new requests
        self._context = context
        self._curve = curve
        self._ping_interval_s = ping_interval_s
        self._on_change = on_change
        self._is_closed = False
        self._connection: Connection | None = None
        self._num_failures = 0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def session(self) -> Session | None:
        """Where it takes requests now."""
        session = None if self._connection is None else self._connection.session
        return session if session is not None and session.is_welcome else None

    def connect(self) -> None:
        """Does nothing the second time. Raises ConnectionLostError if the endpoint is none."""
        if self._connection is None:
            self._open()

    def close(self) -> None:
        """Close for good."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> None:
        self._connection = Connection(
            self._context,
            self.endpoint,
            curve=self._curve,
            ping_interval_s=self._ping_interval_s,
            on_change=self._changed,
        )

    def _changed(self) -> None:
        assert self._connection is not None
        error = self._connection.session.error
        if error is not None:
            self._failed(error)
        else:
            self.error, self._num_failures = None, 0
        self._on_change()

    def _failed(self, error: KvbatonError) -> None:
        if not self._is_closed:
            self.error = error
            pause_s = backoff_s(self._num_failures)
            self._num_failures += 1
            self._retry = asyncio.get_running_loop().call_later(pause_s, self._open_again)

    def _open_again(self) -> None:
        try:
            self._open()
        except ConnectionLostError as error:  # no more files can be opened
            self._failed(error)
