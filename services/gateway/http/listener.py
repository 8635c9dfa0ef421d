"""The socket that HTTP clients connect to, opened here or inherited."""

from __future__ import annotations

import socket

_DEAD_PEER_MS = 60_000
_SEND_BUFFER_BYTES = 128 * 1024  # of an answer that its client does not read; the kernel doubles it


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
            prepare(listener)
            listener.bind(address)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = f"cannot listen for HTTP on {host}:{port}: {error.strerror}"
        raise OSError(error.errno, reason) from error
    return listener


def prepare(listener: socket.socket) -> None:
    """Set what every listening socket has, also one that was inherited. Raises OSError."""
    # Connections inherit these: a peer that vanished, or reads no more, is found out.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_MS)
    listener.setblocking(False)
