"""The live Transport: kvbaton's event-driven sockets as ROUTER and DEALER."""

from __future__ import annotations

import re
from collections.abc import Callable

import zmq

from common.net.transport import DealerHandler, Frames, RouterHandler, TransportError
from kvbaton.sockets import EventSocket, reason

LINGER_MS = 200  # what closing waits for last words, a refusal or a goodbye
_MAPPED_IPV4 = re.compile(r"\[::ffff:([0-9.]+)\]")  # how a socket for both families names IPv4


class ZmqRouter:
    """A bound ROUTER. ROUTER_MANDATORY: without it what cannot be routed vanishes silently."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, handler: RouterHandler
    ) -> None:
        self._socket = EventSocket(
            context,
            zmq.ROUTER,
            lambda frames: handler(bytes(frames[0]), frames[1:]),
            linger_ms=LINGER_MS,
        )
        self._socket.raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.raw.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise TransportError(f"cannot bind {endpoint}: {reason(error)}") from error
        bound = self._socket.raw.getsockopt_string(zmq.LAST_ENDPOINT)
        self.endpoint = _MAPPED_IPV4.sub(r"\1", bound)
        self._socket.start()

    def send(self, peer: bytes, frames: Frames) -> bool:
        return self._socket.send([peer, *frames])

    def close(self) -> None:
        self._socket.close()


class ZmqDealer:
    """A connected DEALER. ZeroMQ gives it a fresh routing id each time, which restarts rely on."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        handler: DealerHandler,
        lost: Callable[[], None] | None,
    ) -> None:
        self._socket = EventSocket(context, zmq.DEALER, handler, linger_ms=LINGER_MS)
        if lost is not None:
            self._socket.watch(zmq.EVENT_DISCONNECTED, lambda _event: lost())
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise TransportError(f"cannot connect to {endpoint}: {reason(error)}") from error

    def send(self, frames: Frames) -> bool:
        return self._socket.send(frames)

    def close(self) -> None:
        self._socket.close()


class ZmqTransport:
    """One ZeroMQ context and the sockets made from it."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def router(self, endpoint: str, handler: RouterHandler) -> ZmqRouter:
        return ZmqRouter(self._context, endpoint, handler)

    def dealer(
        self, endpoint: str, handler: DealerHandler, lost: Callable[[], None] | None = None
    ) -> ZmqDealer:
        return ZmqDealer(self._context, endpoint, handler, lost)

    def close(self) -> None:
        """Every socket must have been closed by its owner; last words get LINGER_MS."""
        self._context.term()
