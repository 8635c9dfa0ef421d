"""A model's chat template, rendered by a child process that is killed if it goes wrong.

A sandbox keeps a template from the file system, but not from running for ever, and neither a signal
nor a thread can stop Python inside one huge multiplication. So it runs where the kernel limits CPU
time and memory (template_child.py). It can break only itself: the next rendering starts anew.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvbaton.errors import OverloadedError
from services.gateway.text.template_child import LENGTH_BYTES, MAX_CPU_S, MAX_MEMORY_BYTES

_CHILD = str(Path(__file__).with_name("template_child.py"))
# The child's CPU time is limited; this is for one that was stopped, or gets no CPU at all.
_TIMEOUT_S = 10.0
_MAX_WAITING = 256


class TemplateFailedError(Exception):
    """The template cannot be compiled, or not rendered with these values; says why."""


class ChatTemplate:
    """A template and its process. One rendering at a time: each takes a fraction of a millisecond.

    Making one raises TemplateFailedError for what is no template.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, "chat-template")
        self._child: _Child | None = _Child(source)

    async def render(self, values: Mapping[str, Any]) -> str:
        """The text. Raises TemplateFailedError, and OverloadedError when too many wait for it."""
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError(
                f"{_MAX_WAITING} conversations already wait for the chat template", retry_after_s=1
            )
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._render, values)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """End the process. Idempotent; a rendering under way fails."""
        if self._child is not None:
            self._child.close()
        self._thread.shutdown(wait=False)

    def _render(self, values: Mapping[str, Any]) -> str:
        if self._child is None or self._child.has_died:
            self._child = _Child(self.source)
        try:
            return self._child.ask(values)
        except OSError as error:
            self._child.close()
            self._child = None
            raise TemplateFailedError(
                f"it did not end within its limits of {MAX_CPU_S:g} s and {MAX_MEMORY_BYTES} bytes"
            ) from error


class _Child:
    """One process. It ends with its parent, whose end of the socket then closes."""

    def __init__(self, source: str) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._socket.settimeout(_TIMEOUT_S)
            self._process = subprocess.Popen(  # noqa: S603 - our own file
                [sys.executable, "-I", _CHILD],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # a Ctrl-C is for the gateway
            )
        self.close = weakref.finalize(self, _end, self._socket, self._process)
        try:
            self.ask(source)
        except (OSError, TemplateFailedError) as error:
            self.close()
            raise TemplateFailedError(str(error)) from error

    @property
    def has_died(self) -> bool:
        return self._process.poll() is not None

    def ask(self, message: Any) -> str:
        """The child's answer. Raises TemplateFailedError, and OSError when the child is gone."""
        try:
            body = json.dumps(message).encode()
        except RecursionError as error:
            raise TemplateFailedError("its values are nested too deeply") from error
        self._socket.sendall(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        length = int.from_bytes(self._receive(LENGTH_BYTES), "big")
        answer: dict[str, str] = json.loads(self._receive(length))
        if "error" in answer:
            raise TemplateFailedError(answer["error"])
        return answer["text"]

    def _receive(self, num_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            part = self._socket.recv(num_bytes - len(received))
            if not part:
                raise ConnectionResetError("its process has died")
            received += part
        return bytes(received)


def _end(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    connection.close()
    process.wait()
