"""The thin shell around a session: a DEALER, timers, and a new connection when one was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy

import zmq

from kvbaton.errors import ConnectionLostError, KvbatonError, ProtocolError
from kvbaton.protocol import Welcome, gateway_message_decoder
from kvbaton.session import Event, Session
from kvbaton.sockets import EventSocket, reason

CLIENT_NAME = "kvbaton-python"
LINGER_MS = 100  # what closing may cost where the gateway does not take our last words


class Connection:
    """Connects and says hello at once. When the session ends, the socket closes with it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        connect_timeout_s: float,
        ping_interval_s: float,
    ) -> None:
        self._endpoint = endpoint
        self._connect_timeout_s = connect_timeout_s
        self._ping_interval_s = ping_interval_s
        self._decoder = gateway_message_decoder()
        self._settled = asyncio.Event()
        self._socket = EventSocket(context, zmq.DEALER, self._on_frames, linger_ms=LINGER_MS)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConnectionLostError(f"cannot connect to {endpoint}: {reason(error)}") from error
        self.session = Session(endpoint, lambda raw: self._socket.send([raw]), CLIENT_NAME)
        self.session.greet()
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(connect_timeout_s, self._give_up)
        self._timer = loop.call_later(ping_interval_s, self._tick)

    async def welcomed(self) -> Welcome:
        """The gateway's welcome. Raises the error that ended the session instead."""
        await self._settled.wait()
        if self.session.error is not None:
            raise copy(self.session.error)
        assert self.session.welcome is not None
        return self.session.welcome

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

    def _give_up(self) -> None:
        self.session.end(
            ConnectionLostError(
                f"no welcome from {self._endpoint} within {self._connect_timeout_s:g} s"
            )
        )
        self._settle()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._ping_interval_s, self._tick)
        self.session.tick()
        self._settle()

    def _settle(self) -> None:
        """Act on what the session has become."""
        if self.session.welcome is not None:
            self._patience.cancel()
            self._settled.set()
        if self.session.error is not None:
            self._patience.cancel()
            self._timer.cancel()
            self._settled.set()
            self._socket.close()


class Gateway:
    """A gateway as a client sees it: connected when there is something to say to it.

    All methods belong to one event loop. Requests are known by the caller's numbers, never reused.
    """

    def __init__(self, endpoint: str, *, connect_timeout_s: float, ping_interval_s: float) -> None:
        self._endpoint = endpoint
        self._connect_timeout_s = connect_timeout_s
        self._ping_interval_s = ping_interval_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connection: Connection | None = None

    async def connect(self) -> Welcome:
        """Connect unless connected. Raises ConnectionLostError, or ProtocolError when refused."""
        return await self._connected().welcomed()

    def start(self, request_id: int, raw: bytes, sink: Callable[[Event], None]) -> None:
        """Send an encoded `generate`; `sink` hears everything about it, failures too."""
        try:
            self._connected().session.start(request_id, raw, sink)
        except KvbatonError as error:
            sink(error)

    def cancel(self, request_id: int) -> None:
        """Ask for the end of a request. Does nothing once it has ended."""
        if self._connection is not None:
            self._connection.session.cancel(request_id)

    def close(self) -> None:
        """Close for good. May block for LINGER_MS where the gateway is gone. Idempotent."""
        if self._connection is not None:
            self._connection.close()
        self._context.term()

    def _connected(self) -> Connection:
        if self._context.closed:
            raise ConnectionLostError("the client was closed")
        if self._connection is None or self._connection.session.error is not None:
            self._connection = Connection(
                self._context,
                self._endpoint,
                connect_timeout_s=self._connect_timeout_s,
                ping_interval_s=self._ping_interval_s,
            )
        return self._connection
