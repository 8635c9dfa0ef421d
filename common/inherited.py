"""Sockets that the supervisor has opened and keeps open: socket activation, sd_listen_fds(3).

A process that ends leaves them as they are. Who connects meanwhile waits in the kernel's queue for
the next process, or for another one that has inherited the same socket.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from common.config import StartError

FIRST_FD = 3

_PID, _COUNT, _NAMES = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"


def take_listener(environ: MutableMapping[str, str], pid: int) -> socket.socket | None:
    """The stream socket that process `pid` is to accept connections from; None if it has to open
    one itself. Raises StartError for several, or what is no such socket."""
    owner, count = environ.pop(_PID, ""), environ.pop(_COUNT, "")
    environ.pop(_NAMES, "")
    if owner != str(pid) or not count.isdecimal() or count == "0":
        return None
    if count != "1":
        raise StartError(f"a process takes one inherited socket, got {count}: see its socket unit")
    os.set_inheritable(FIRST_FD, False)
    try:
        listener = socket.socket(fileno=FIRST_FD)
    except OSError as error:
        raise StartError(f"descriptor {FIRST_FD} is no socket: {error.strerror}") from error
    is_stream = listener.type == socket.SOCK_STREAM
    if not is_stream or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.close()
        raise StartError("the inherited socket takes no connections: it must be a ListenStream=")
    return listener
