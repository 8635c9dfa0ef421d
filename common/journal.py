"""journald's native protocol: a datagram for each event, in which every field can be searched.

Source: systemd, "Native Journal Protocol" (systemd.io/JOURNAL_NATIVE_PROTOCOL): lines KEY=value; a
value of several lines is preceded by its length instead.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "JOURNAL_STREAM"  # DEVICE:INODE of the stream that systemd has connected to the journal
SOCKET = Path("/run/systemd/journal/socket")

_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_DEFAULT_PRIORITY = 6
_NO_FIELD = re.compile(r"[^A-Z0-9_]")
_MAX_NAME_CHARS = 64
_OWN = {"request": "REQUEST_ID", "trace": "TRACE_ID", "service": "SYSLOG_IDENTIFIER"}


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether what is written to `stream` goes to the journal anyway."""
    device, _, inode = environ.get(VARIABLE, "").partition(":")
    if not inode:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


class Journal:
    """A logger of structlog's: each of its methods takes an event's fields."""

    def __init__(self, path: Path = SOCKET, fallback: TextIO = sys.stderr) -> None:
        self._path = str(path)
        self._fallback = fallback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def msg(self, **event: Any) -> None:
        """One event. What the journal does not take is a line of JSON on the fallback, which goes
        there by another way, with its priority before it."""
        try:
            self._socket.sendto(datagram(event), self._path)
        except OSError:
            line = json.dumps(event, default=str)
            print(f"<{_priority(event)}>{line}", file=self._fallback, flush=True)

    debug = info = warning = error = critical = msg

    def close(self) -> None:
        """The process's own is never closed."""
        self._socket.close()


def datagram(event: Mapping[str, Any]) -> bytes:
    """An event's fields as the journal reads them."""
    fields = {"PRIORITY": str(_priority(event)), "MESSAGE": _message(event)}
    fields |= {_name(key): _text(value) for key, value in event.items() if key != "level"}
    return b"".join(_field(name, value.encode()) for name, value in fields.items())


def _priority(event: Mapping[str, Any]) -> int:
    return _PRIORITIES.get(str(event.get("level")), _DEFAULT_PRIORITY)


def _message(event: Mapping[str, Any]) -> str:
    """What journalctl shows: the event, and the fields as words."""
    rest = [
        f"{key}={_text(value)}"
        for key, value in event.items()
        if key not in ("event", "level", "service", "exception")
    ]
    line = " ".join([_text(event.get("event", "")), *rest])
    return f"{line}\n{event['exception']}" if "exception" in event else line


def _name(key: str) -> str:
    return _OWN.get(key) or "KVBATON_" + _NO_FIELD.sub("_", key.upper())[: _MAX_NAME_CHARS - 8]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _field(name: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return name.encode() + b"=" + value + b"\n"
    return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
