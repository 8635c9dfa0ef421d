"""Logs: structlog, one event a line, for people on a terminal and as JSON elsewhere; under systemd
events go to the journal, field by field. The level can be changed at any time."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import structlog

from common.journal import SOCKET, Journal, is_journal

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _Logger(structlog.make_filtering_bound_logger(logging.INFO)):  # type: ignore[misc]
    """The class of every logger. Its base says which events are taken: `set_log_level` puts another
    one in its place, so that a level costs nothing where it is not wanted."""


def set_log_level(level: str) -> None:
    """From now on this process logs events of this level and above."""
    _Logger.__bases__ = (structlog.make_filtering_bound_logger(_LEVELS[level]),)


def change_log_level(level: str) -> None:
    """As `set_log_level`, while the process serves: the log itself says so."""
    set_log_level(level)
    structlog.get_logger().warning("log_level_changed", now=level)


def configure_logging(level: str, service: str, journal: Path = SOCKET) -> None:
    """Set up structlog for this process; `service` (decode.2) is bound to every event. `journal` is
    the socket of journald, which is used where stderr is connected to it."""
    set_log_level(level)
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
    ]
    factory: Any
    if is_journal(sys.stderr, os.environ):
        processors.append(structlog.processors.format_exc_info)
        logger = Journal(journal)
        factory = lambda *_: logger  # noqa: E731
    else:
        is_terminal = sys.stderr.isatty()
        renderer = (
            structlog.dev.ConsoleRenderer if is_terminal else structlog.processors.JSONRenderer
        )
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer(),
        ]
        factory = structlog.PrintLoggerFactory(sys.stderr)
    structlog.configure(
        processors=processors,
        wrapper_class=_Logger,
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
