"""What a person sees: lines, one that changes while they wait, and the logs of the services."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

DIM, RED, YELLOW, BOLD = "2", "31", "33", "1"

_HONCHO_LINE = re.compile(r"(\d\d:\d\d:\d\d) (\S+) *\| ?(.*)")
_COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
_OWN_KEYS = ("service", "event", "message", "level", "timestamp", "exception")


class Screen:
    """Prints for several threads. On a terminal there are colours and the progress is one line that
    changes; elsewhere it is a line whenever it becomes another."""

    def __init__(self, stream: IO[str] = sys.stdout) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._progress = ""
        self._is_mid_line = False
        self._held: list[str] | None = None
        self._is_terminal = stream.isatty()
        self._has_colours = self._is_terminal and "NO_COLOR" not in os.environ

    def styled(self, text: str, *styles: str) -> str:
        """The text with ANSI styles, where they can be seen."""
        return f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if self._has_colours else text

    def line(self, text: str = "") -> None:
        """Print a line, above the progress."""
        with self._lock:
            self._line(text)

    def part(self, text: str) -> None:
        """Print a part of a line; the next `line` ends it."""
        with self._lock:
            self._write(text)
            self._is_mid_line = not text.endswith("\n") if text else self._is_mid_line

    def log(self, text: str) -> None:
        """Print a line that somebody else has written, now or after `without_logs`."""
        with self._lock:
            if self._held is None:
                self._line(text)
            else:
                self._held.append(text)

    @contextmanager
    def without_logs(self) -> Iterator[None]:
        """Keep together what is printed meanwhile."""
        with self._lock:
            self._held = []
        try:
            yield
        finally:
            with self._lock:
                for text in self._held:
                    self._line(text)
                self._held = None

    def progress(self, text: str, detail: str = "") -> None:
        """Say what is going on; `detail`, such as a time, is shown on terminals only."""
        with self._lock:
            self._end_line()
            if self._is_terminal:
                self._erase()
                width = shutil.get_terminal_size().columns - 1
                self._progress = self.styled(f"{text} {detail}"[:width], DIM)
                self._write(self._progress)
            elif text != self._progress:
                self._progress = text
                self._write(text + "\n")

    def end_progress(self) -> None:
        """Take the progress away."""
        with self._lock:
            self._erase()
            self._progress = ""

    def _line(self, text: str) -> None:
        self._end_line()
        self._erase()
        self._write(text + "\n")
        if self._is_terminal:
            self._write(self._progress)

    def _end_line(self) -> None:
        if self._is_mid_line:
            self._is_mid_line = False
            self._write("\n")

    def _erase(self) -> None:
        if self._is_terminal and self._progress:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class LogLine:
    """One line that honcho passed on. `fields` is empty unless the line is a structured event."""

    def __init__(self, raw: str) -> None:
        match = _HONCHO_LINE.fullmatch(raw)
        self.time, self.process, self.text = match.groups() if match else ("", "honcho", raw)
        self.fields = _event_fields(self.text)
        self.level: str = self.fields.get("level", "info" if self.process == "system" else "plain")

    @property
    def is_important(self) -> bool:
        """Warnings, errors, and what is no event at all, such as a traceback or usage."""
        return self.level not in ("debug", "info")

    def render(self, screen: Screen) -> str:
        """The line, or several, for people."""
        head = screen.styled(f"{self.time} {self.process:<10}", DIM)
        if not self.fields:
            return f"{head} {self.text}"
        event = self.fields.get("message") or self.fields["event"].replace("_", " ")
        style = {"warning": YELLOW, "error": RED, "critical": RED}.get(self.level, DIM)
        rest = [f"{key}={value}" for key, value in self.fields.items() if key not in _OWN_KEYS]
        lines = [" ".join([head, screen.styled(event, style), screen.styled(" ".join(rest), DIM)])]
        lines += self.fields.get("exception", "").splitlines()
        return "\n".join(line.rstrip() for line in lines)


def _event_fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(_COLOUR_CODE.sub("", text))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and isinstance(fields.get("event"), str) else {}
