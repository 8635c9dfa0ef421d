"""`top`: the status, redrawn until q or Ctrl-C; where nobody watches it is printed once."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from kvbaton.commands.members import status, status_parts
from kvbaton.commands.options import operator_of
from kvbaton.operations import Standing
from kvbaton.tables import plain_lines, renderables

_CLEAR = "\x1b[H\x1b[2J"


async def top(options: argparse.Namespace) -> int:
    """Returns 0 when the user has seen enough."""
    if options.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return await status(options)
    async with operator_of(options) as operator:
        with _screen() as show, _stop_key() as stop:
            while not stop.is_set():
                show(await operator.status())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(options.interval):
                        await stop.wait()
    return 0


@contextlib.contextmanager
def _stop_key() -> Iterator[asyncio.Event]:
    """Set when q is pressed, or nothing can be pressed any more."""
    stop = asyncio.Event()
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()

    def on_key() -> None:
        if os.read(descriptor, 64) in (b"", b"q", b"Q"):
            stop.set()

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, on_key)
    try:
        yield stop
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[Standing], None]]:
    """What puts a standing in the place of the one before: rich's if it is installed."""
    try:
        from rich.console import Group
        from rich.live import Live
    except ImportError:
        yield _show_plain
        return
    with Live(screen=True, auto_refresh=False) as live:
        yield lambda standing: live.update(
            Group(*renderables(status_parts(standing))), refresh=True
        )


def _show_plain(standing: Standing) -> None:
    print(_CLEAR + "\n".join(plain_lines(status_parts(standing))), flush=True)
