"""What a case found: tables for people, figures for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmarks.measure import Spread

_WIDTH = 100


class Report:
    """One run of one case. `settings` says what was measured; figures are added as they come.

    `is_whole`: nobody ended it before all was measured.
    """

    def __init__(self, case: str, settings: dict[str, Any]) -> None:
        self.case = case
        self.settings = settings
        self.figures: dict[str, Any] = {}
        self.is_whole = True
        self._tables: list[Table] = []
        self._notes: list[str] = []

    def table(self, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Show a table; all columns but the first are numbers."""
        table = Table(title=title, title_justify="left")
        for place, column in enumerate(columns):
            # What a row is about is never cut: targets differ in their last setting.
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._tables.append(table)

    def note(self, text: str) -> None:
        """Show a sentence below the tables."""
        self._notes.append(text)

    def show(self) -> None:
        """Print everything."""
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        named = {**self.settings, **machine()}
        console.print(", ".join(f"{name} {value}" for name, value in named.items()), style="dim")
        for table in self._tables:
            console.print(table)
        for note in self._notes:
            console.print(note)

    def write(self, path: Path) -> None:
        """Write case, settings, machine and figures as JSON; a Spread becomes its fields.

        The file is replaced as a whole: whenever this process ends, it is one report or the next.
        """
        content = {
            "case": self.case,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": self.settings,
            "machine": machine(),
            "figures": self.figures,
        }
        text = json.dumps(content, indent=2, default=_plain)
        draft = path.with_name(f"{path.name}.new")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(path)


def report_of(
    rounds: Generator[None, None, None], report: Callable[[], Report], path: Path | None
) -> Report:
    """What `report` makes of all that the rounds have measured; they run as they are asked for.

    It is written to `path` after each of them. SIGINT or SIGTERM ends them early, and the report is
    then of what was measured until there.
    """
    try:
        with closing(rounds):
            for _ in rounds:
                if path is not None:
                    report().write(path)
    except (KeyboardInterrupt, SystemExit):
        found = report()
        found.is_whole = False
        return found
    return report()


def _plain(value: object) -> Any:
    if isinstance(value, Spread):
        return dataclasses.asdict(value)
    return str(value)


def machine() -> dict[str, Any]:
    """The processor, how many cores this system has, and how busy it is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }
