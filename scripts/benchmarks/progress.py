"""A progress bar on the terminal, drawn only when something was done: it costs nothing between."""

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
