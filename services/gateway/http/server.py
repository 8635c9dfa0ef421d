"""uvicorn as a part of our process: no signal handlers, no ticking, bounded heads, a quick end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import structlog
import uvicorn
from prometheus_client import Counter
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.metrics import REGISTRY
from services.gateway.http.openai.errors import error_body

log = structlog.get_logger()

_SLOW_READERS = Counter(
    "kvbaton_http_slow_readers",
    "Connections cut off because the client did not read",
    registry=REGISTRY,
)
_MAX_HEAD_BYTES = 64 * 1024
_HEAD_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 75
_END_TIMEOUT_S = 0.5
# The whole of a body, whether anybody reads it or not; who reads it has a shorter limit of its own.
_BODY_TIMEOUT_S = 65.0
# What a connection may hold here of an answer that its client does not read; listener.py says how
# much the kernel does.
_WRITE_BUFFER_BYTES = 16 * 1024
# Who reads at least this much within the time is slow, but reads.
_MIN_PROGRESS_BYTES = 16 * 1024
_NO_LINGERING = struct.pack("ii", 1, 0)


class _Protocol(HttpToolsProtocol):
    """A connection whose client must send whole, small heads in time, and read its answers.

    httptools keeps what belongs to no body yet (heads, chunk extensions, trailers) without limit.
    """

    def __init__(
        self, *args: Any, slow_reader_s: float, gone: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._slow_reader_s = slow_reader_s
        self._gone = gone
        self._is_last = False  # the request that is here, or the next one
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES, low=0)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_body_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)
        self._gone()

    def finish(self) -> None:
        """Close when what has been asked is answered. A connection that has brought no request yet
        may bring one: its client could not know."""
        is_between = self.cycle is not None and self.cycle.response_complete
        if is_between and not self._num_head_bytes:
            self.transport.close()
        elif self.cycle is not None and not is_between:
            self.cycle.keep_alive = False
        self._is_last = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head is larger than {_MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = 0
        self._stop_head_timer()
        if self._body_timer is None:
            self._start_body_timer()
        super().on_headers_complete()
        if self._is_last and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        self._stop_body_timer()
        super().on_message_complete()

    def send_400_response(self, _msg: str) -> None:
        self._refuse(400, "this is not HTTP")

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_body_timer(self) -> None:
        self._body_timer = self.loop.call_later(_BODY_TIMEOUT_S, self._on_body_timeout)

    def _on_body_timeout(self) -> None:
        self._body_timer = None
        if self.flow.read_paused:  # it waits for us
            self._start_body_timer()
        else:
            self.transport.abort()

    def _stop_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _watch_reader(self) -> None:
        """Nothing more is written before all is read, or ever: see later how far the client is."""
        self._stop_reader_timer()
        num_bytes = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(
            self._slow_reader_s, self._check_reader, num_bytes
        )

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _check_reader(self, num_bytes_before: int) -> None:
        self._reader_timer = None
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes == 0:
            return
        if num_bytes_before - num_bytes >= _MIN_PROGRESS_BYTES:
            self._watch_reader()
            return
        _SLOW_READERS.inc()
        log.info("slow_reader_cut_off", num_bytes_unread=num_bytes)
        # Or the kernel would keep what it has, for as long as the client takes some of it.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.transport.abort()

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self._num_head_bytes == 0:
            self.transport.close()
            return
        reason = f"no whole head within {_HEAD_TIMEOUT_S:.0f} s"
        self._refuse(408, reason)

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never reaches the application; nothing may be written into an answer."""
        if self.cycle is None or self.cycle.response_complete:
            body = error_body(status, message)
            head = (
                f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._watch_reader()


class HttpServer(uvicorn.Server):
    """Serves an ASGI application on one socket until `stop` is called."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None, slow_reader_s: float) -> None:
        config = uvicorn.Config(
            app,
            loop="none",
            http=partial(  # type: ignore[arg-type]
                _Protocol, slow_reader_s=slow_reader_s, gone=self._connection_gone
            ),
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
        config.load()
        config.ssl = tls
        super().__init__(config)
        self._stopped = asyncio.Event()
        self._emptied = asyncio.Event()

    def stop(self) -> None:
        """Ask `serve` to end: within half a second, even with clients that do not read."""
        self._stopped.set()

    async def hand_over(self) -> None:
        """Leave new connections to another process with the same socket; returns when those that
        are here have ended."""
        for server in self.servers:
            server.close()
        connections = self.server_state.connections
        for connection in list(connections):
            assert isinstance(connection, _Protocol)
            connection.finish()
        while connections:
            self._emptied.clear()
            await self._emptied.wait()

    def _connection_gone(self) -> None:
        if not self.server_state.connections:
            self._emptied.set()

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
