"""The live Transport: kvbaton's event-driven sockets as ROUTER and DEALER, encrypted if there are
keys."""

from __future__ import annotations

import re
from collections.abc import Callable

import zmq

from common.net.access import Keys
from common.net.transport import DealerHandler, Frames, RouterHandler, TransportError
from common.net.zap import ZapHandler
from kvbaton.sockets import MAX_FRAME_BYTES, Curve, EventSocket, reason

LINGER_MS = 200  # what closing waits for last words, a refusal or a goodbye
# A host that was cut off says no goodbye. TCP alone tries for a quarter of an hour, less and less
# often: a host that comes back would not be found for minutes.
LOST_HOST_MS = 10_000  # a connection on which nothing sent is acknowledged for so long has ended
CONNECT_MS = 2_000  # a host that does not answer is called again
_KEEPALIVE_S = 10  # who has nothing to send asks so often whether the other is there
# What the kernel keeps (it doubles the number) for a peer that may stop reading.
SLOW_READER_BUFFER_BYTES = 128 * 1024
_MAPPED_IPV4 = re.compile(r"\[::ffff:([0-9.]+)\]")  # how a socket for both families names IPv4


class ZmqRouter:
    """A bound ROUTER. ROUTER_MANDATORY: without it what cannot be routed vanishes silently."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        handler: RouterHandler,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        slow_reader_s: float | None = None,
        curve: Curve | None = None,
    ) -> None:
        self._socket = EventSocket(
            context,
            zmq.ROUTER,
            lambda frames: handler(bytes(frames[0]), frames[1:], self._socket.user),
            linger_ms=LINGER_MS,
        )
        self._socket.raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.raw.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        _watch_host(self._socket)
        if slow_reader_s is not None:
            # The kernel ends a connection whose window stays shut, and with it goes ZeroMQ's queue.
            self._socket.raw.setsockopt(zmq.TCP_MAXRT, max(1, round(slow_reader_s * 1000)))
            self._socket.raw.setsockopt(zmq.SNDBUF, SLOW_READER_BUFFER_BYTES)
        if curve is not None:
            self._socket.secure(curve)
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
        curve: Curve | None = None,
    ) -> None:
        self._socket = EventSocket(context, zmq.DEALER, handler, linger_ms=LINGER_MS)
        _watch_host(self._socket)
        self._socket.raw.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        if curve is not None:
            self._socket.secure(curve)
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


def _watch_host(end: EventSocket) -> None:
    """Have the kernel end connections to a host that is cut off; a process that is busy is none."""
    end.raw.setsockopt(zmq.TCP_MAXRT, LOST_HOST_MS)
    end.raw.setsockopt(zmq.TCP_KEEPALIVE, 1)
    end.raw.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_S)
    end.raw.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_S)


class ZmqTransport:
    """One ZeroMQ context and the sockets made from it: with `keys`, each of them is encrypted, and
    the context's ZAP handler decides who gets in. Without, everybody does. Connections are spread
    over `io_threads`, which encrypt and decrypt."""

    def __init__(self, keys: Keys | None = None, io_threads: int = 1) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads)
        self._keys = keys
        self._zap = None if keys is None else ZapHandler(self._context, keys.public.users())

    def router(
        self,
        endpoint: str,
        handler: RouterHandler,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        slow_reader_s: float | None = None,
    ) -> ZmqRouter:
        return ZmqRouter(
            self._context,
            endpoint,
            handler,
            max_frame_bytes=max_frame_bytes,
            slow_reader_s=slow_reader_s,
            curve=None if self._keys is None else self._keys.binding,
        )

    def dealer(
        self,
        endpoint: str,
        handler: DealerHandler,
        lost: Callable[[], None] | None = None,
        role: str = "",
    ) -> ZmqDealer:
        curve = None if self._keys is None else self._keys.connecting(role)
        return ZmqDealer(self._context, endpoint, handler, lost, curve)

    async def prove(self) -> None:
        """Try a key that nobody knows on a socket as all others are made. Raises StartError if it
        is let in."""
        if self._keys is None or self._zap is None:
            return
        router = self.router("tcp://127.0.0.1:*", lambda _peer, _frames, _user: None)
        try:
            await self._zap.prove(router.endpoint, self._keys.own.public_key)
        finally:
            router.close()

    def close(self) -> None:
        """Every socket must have been closed by its owner; last words get LINGER_MS."""
        if self._zap is not None:
            self._zap.close()
        self._context.term()
