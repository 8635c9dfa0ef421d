"""A port with a process's /metrics and nothing else, for those that serve no other HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import CONTENT_TYPE_LATEST

from common.config import StartError
from common.net.access import is_loopback_host

log = structlog.get_logger()

HOST_HELP = "address of the port with metrics"
PORT_HELP = "port where Prometheus reads this process's metrics; 0: none"

_MAX_HEAD_BYTES = 8 * 1024
_TIMEOUT_S = 10.0  # for the whole of a request and its answer
_MAX_CONNECTIONS = 16


class MetricsPort:
    """`metrics()` is asked for at each scrape. Does nothing between them."""

    def __init__(self, metrics: Callable[[], bytes]) -> None:
        self.connections: set[_Connection] = set()
        self.metrics = metrics
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen, unless the port is 0. Raises StartError."""
        if not port:
            return
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port)
        except OSError as error:
            raise StartError(
                f"cannot serve metrics at {host}:{port}: {error.strerror or error}"
            ) from error
        if not is_loopback_host(host):
            log.warning("metrics_are_open", host=host, reason="whoever reaches the port reads them")

    def close(self) -> None:
        """Stop listening and end every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()


class _Connection(asyncio.Protocol):
    """One request, one answer."""

    def __init__(self, port: MetricsPort) -> None:
        self._port = port
        self._head = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(_TIMEOUT_S, self.abort)
        self._port.connections.add(self)
        if len(self._port.connections) > _MAX_CONNECTIONS:
            self.abort()

    def data_received(self, data: bytes) -> None:
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._transport.pause_reading()
            self._answer()
        elif len(self._head) > _MAX_HEAD_BYTES:
            self.abort()

    def connection_lost(self, _error: Exception | None) -> None:
        self._timer.cancel()
        self._port.connections.discard(self)

    def abort(self) -> None:
        """End the connection, whatever has been sent."""
        self._transport.abort()

    def _answer(self) -> None:
        method, _, rest = self._head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != b"/metrics":
            self._send("404 Not Found", "text/plain", b"only /metrics is here\n")
        elif method != b"GET":
            self._send("405 Method Not Allowed", "text/plain", b"GET it\n")
        else:
            self._send("200 OK", CONTENT_TYPE_LATEST, self._port.metrics())

    def _send(self, status: str, kind: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self._transport.close()
