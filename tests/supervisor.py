"""The other end of NOTIFY_SOCKET: what systemd would hear, without systemd."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from pathlib import Path


class Supervisor:
    """A real AF_UNIX datagram socket, in a file or, with a name like "@name", in none.

    `heard` has every line in order, those of one datagram one after another."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[str] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def listen(self) -> list[str]:
        """The lines that came since the last call, without waiting."""
        self.socket.settimeout(0)
        lines: list[str] = []
        with suppress(BlockingIOError):
            while True:
                lines += self._take()
        return lines

    def wait_for(self, line: str, timeout_s: float) -> list[str]:
        """Wait until this line has come, or one that begins so; the lines up to it."""
        deadline = time.monotonic() + timeout_s
        lines: list[str] = []
        while not any(each.startswith(line) for each in lines):
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            lines += self._take()
        return lines

    async def wait_for_async(self, line: str) -> list[str]:
        """The same, while the event loop turns."""
        return await asyncio.to_thread(self.wait_for, line, 20)

    def _take(self) -> list[str]:
        lines = self.socket.recv(65536).decode().splitlines()
        self.heard += lines
        return lines

    def close(self) -> None:
        self.socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink()
