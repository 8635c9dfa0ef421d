"""Renders a model's chat template, in a process of its own that may die of it: see templates.py.

Descriptor 0 is a socket. Messages are JSON after their length in four bytes. The first holds the
template, each other one the values of a rendering; each is answered with a text or an error. The
kernel kills the process when one of them takes too much CPU time, and refuses it too much memory.

This file runs alone (`python -I`), so it imports nothing of ours.
"""

from __future__ import annotations

import datetime
import io
import json
import resource
import signal
import socket
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_CPU_S = 1.0
MAX_MEMORY_BYTES = 512 * 1024 * 1024
MAX_OUTPUT_CHARS = 16 * 1024 * 1024
MAX_REASON_CHARS = 300
LENGTH_BYTES = 4


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the answers in training data; here it has no meaning."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What chat templates are written for: the environment of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja2's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


class Renderer:
    """Takes the messages of the parent in turn."""

    def __init__(self) -> None:
        self._template: jinja2.Template | None = None

    def answer(self, message: Any) -> dict[str, str]:
        """What is sent back for one message."""
        try:
            if self._template is None:
                self._template = _environment().from_string(message)
                return {"text": ""}
            return {"text": self._render(self._template, message)}
        except (MemoryError, RecursionError) as error:
            return {"error": f"it needs too much memory or depth ({type(error).__name__})"}
        except Exception as error:  # a template can raise anything
            return {"error": str(error)[:MAX_REASON_CHARS]}

    def _render(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        parts = []
        num_chars = 0
        for part in template.generate(**values):
            num_chars += len(part)
            if num_chars > MAX_OUTPUT_CHARS:
                raise ValueError(f"its output has more than {MAX_OUTPUT_CHARS} characters")
            parts.append(part)
        return "".join(parts)


def _serve(stream: io.BufferedRWPair) -> None:
    """Until the parent closes its end."""
    renderer = Renderer()
    while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        body = stream.read(int.from_bytes(head, "big"))
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        answer = json.dumps(renderer.answer(json.loads(body))).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        stream.write(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
        stream.flush()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=0) as parent, parent.makefile("rwb") as stream:
        _serve(stream)


if __name__ == "__main__":
    main()
