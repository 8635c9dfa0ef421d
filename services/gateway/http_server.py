"""uvicorn as a part of our process: no signal handlers, no ticking, bounded heads, a quick end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.openai.errors import error_body

_MAX_HEAD_BYTES = 64 * 1024
_HEAD_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 75
_DEAD_PEER_MS = 60_000
_END_TIMEOUT_S = 0.5


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket that other gateways may share; port 0 takes a free one. Raises OSError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Connections inherit these: a peer that vanished, or reads no more, is found out.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_MS)
            listener.bind(address)
            listener.listen(backlog)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = f"cannot listen for HTTP on {host}:{port}: {error.strerror}"
        raise OSError(error.errno, reason) from error
    return listener


class _Protocol(HttpToolsProtocol):
    """A connection whose client must send whole, small heads in time.

    httptools keeps what belongs to no body yet (heads, chunk extensions, trailers) without limit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head is larger than {_MAX_HEAD_BYTES} bytes", "head_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, _msg: str) -> None:
        self._refuse(400, "this is not HTTP", "bad_request")

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self._num_head_bytes == 0:
            self.transport.close()
            return
        reason = f"no whole head within {_HEAD_TIMEOUT_S:.0f} s"
        self._refuse(408, reason, "request_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer what never reaches the application; nothing may be written into an answer."""
        if self.cycle is None or self.cycle.response_complete:
            body = error_body(status, message, code)
            head = (
                f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves an ASGI application on one socket until `stop` is called."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=_Protocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="critical",  # failures are logged where they happen
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ask `serve` to end: within half a second, even with clients that do not read."""
        self._stopped.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's."""
        yield

    async def main_loop(self) -> None:
        """uvicorn wakes ten times a second here; there is nothing to wake for."""
        await self._stopped.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            _, late = await asyncio.wait(set(state.tasks), timeout=_END_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for connection in list(state.connections):
            connection.transport.abort()
