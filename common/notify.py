"""Tells the supervisor how this process is: systemd's notification protocol, sd_notify(3).

One datagram to the AF_UNIX socket that NOTIFY_SOCKET names holds lines such as READY=1, STATUS=text
and WATCHDOG=1. Without a supervisor nothing is said to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

import structlog

log = structlog.get_logger()

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLE = "WATCHDOG_USEC"
WATCHDOG_PID_VARIABLE = "WATCHDOG_PID"

_BEATS_PER_LIMIT = 4  # sd_watchdog_enabled(3) asks for 2; a step may take the time of the others
_MAX_STATUS_CHARS = 200
_SEND_TIMEOUT_S = 2.0  # of what must not be lost


class Notifier:
    """Says what happens to this process. `beat_every_s` 0: nobody waits for signs of life.

    Signs of life are for whoever runs the loop that does the work: where it hangs none is sent, and
    systemd starts the process again. `describe()` is the status that goes with each.
    """

    def __init__(self, address: str = "", beat_every_s: float = 0.0) -> None:
        """`address` is a path, or begins with "@" for a name that is in no file system; "" is
        nobody's."""
        self.beat_every_s = beat_every_s
        self.describe: Callable[[], str] = str
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._last_beat_at = float("-inf")
        self._is_ready = False
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str], pid: int) -> Notifier:
        """What the supervisor has told process `pid`; its children are not to hear of it."""
        address = environ.pop(SOCKET_VARIABLE, "")
        limit_us = environ.pop(WATCHDOG_VARIABLE, "")
        watched = environ.pop(WATCHDOG_PID_VARIABLE, str(pid))
        if address[:1] not in ("", "/", "@"):
            log.warning("supervisor_not_told", reason=f"{SOCKET_VARIABLE} is no AF_UNIX socket")
            address = ""
        if not address or watched != str(pid) or not limit_us.isdecimal():
            return cls(address)
        return cls(address, int(limit_us) / 1e6 / _BEATS_PER_LIMIT)

    def status(self, text: str) -> None:
        """What the process is doing, in one line for people."""
        self._send(_status_line(text))

    def ready(self, text: str) -> None:
        """It can do its work."""
        self._is_ready = True
        self._send(f"READY=1\n{_status_line(text)}", timeout_s=_SEND_TIMEOUT_S)

    def stopping(self, text: str) -> None:
        """It ends its work."""
        self._is_ready = False
        self._send(f"STOPPING=1\n{_status_line(text)}", timeout_s=_SEND_TIMEOUT_S)

    def beat(self) -> None:
        """A sign of life, and how things are; as often as one likes, for few of them are sent."""
        if not self.beat_every_s:
            return
        now = time.monotonic()
        if now - self._last_beat_at < self.beat_every_s:
            return
        self._last_beat_at = now
        status = f"\n{_status_line(self.describe())}" if self._is_ready else ""
        self._send(f"WATCHDOG=1{status}")

    async def wait(self, event: asyncio.Event) -> None:
        """Wait until the event is set, or for as long as one may be silent."""
        if not self.beat_every_s:
            await event.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.beat_every_s):
                await event.wait()

    async def beat_on(self) -> None:
        """Beat for as long as the event loop turns: for services whose work it is."""
        while True:
            self.beat()
            await asyncio.sleep(self.beat_every_s)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, lines: str, timeout_s: float = 0.0) -> None:
        if self._socket is None:
            return
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendto(lines.encode(), socket.MSG_NOSIGNAL, self._address)
        except OSError as error:  # full, or gone: the next line may find it
            log.warning("supervisor_not_told", reason=os.strerror(error.errno or 0))


def _status_line(text: str) -> str:
    return f"STATUS={' '.join(text.split())[:_MAX_STATUS_CHARS]}"
