"""How far a measurement is, on stderr: on a terminal a bar, drawn only when something was done, so
that it costs nothing between; elsewhere a line for each part that ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Call what it gives once for each of `total` parts. Without a terminal nothing is shown."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = console.is_terminal
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not shown
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        yield advance


def say(line: str) -> None:
    """Show a line where there is no terminal, for whoever follows a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(line, file=console.file, flush=True)  # rich would break the line
