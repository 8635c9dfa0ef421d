"""One TOML file for a whole cluster, as one service reads it: what is common, then its own tables.

Keys above the first table are for every service that has them; [worker] is for both kinds of
worker. A key that no service could mean is refused, with the nearest right name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# The tables that a role reads, the later one first in what it says.
TABLES_OF = {
    "gateway": ("gateway",),
    "kvstore": ("kvstore",),
    "prefill": ("worker", "prefill"),
    "decode": ("worker", "decode"),
}
TABLES = tuple(dict.fromkeys(name for names in TABLES_OF.values() for name in names))
# Settings that services of several kinds have, with one meaning for all processes of a host.
COMMON = (
    "model", "stores", "keys", "insecure", "advertise", "drain_s", "metrics_host", "log_level",
    "nixl_devices",
)  # fmt: skip

_TABLE = re.compile(r"\s*\[\s*([\w-]+)\s*\]")
_KEY = re.compile(r"\s*([\w-]+)\s*=")


class ConfigFileError(ValueError):
    """The file cannot be used; the message names it, the key, and what would be right."""


class Given(NamedTuple):
    """What the file says of a setting, and where."""

    value: Any
    place: str


class ConfigFile:
    """A file that was read."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigFileError if it is no TOML."""
        try:
            text = path.read_text(encoding="utf-8")
            self._content = tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise ConfigFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        self._path = path
        self._lines = dict(_lines(text))

    def settings(self, role: str, names: Iterable[str]) -> dict[str, Given]:
        """What is said to a role, whose settings have these names. Raises ConfigFileError for a key
        that is nobody's, at the top or in the role's own tables."""
        known, own = list(names), TABLES_OF[role]
        for key in self._content:
            self._check_top(key, known, own[-1])
        for table in own:
            for key in self._table(table):
                if key not in known:
                    raise self._unknown(table, key, known)
        return {key: given for key, given in self.said(role).items() if key in known}

    def said(self, role: str) -> dict[str, Given]:
        """All that is said to a role, right or wrong. Raises ConfigFileError."""
        common = {key: value for key, value in self._content.items() if key not in TABLES}
        tables = [("", common), *((name, self._table(name)) for name in TABLES_OF[role])]
        return {
            key: Given(value, self._place(table, key))
            for table, content in tables
            for key, value in content.items()
        }

    def _check_top(self, key: str, known: list[str], own: str) -> None:
        if key in TABLES or key in COMMON:
            return
        if isinstance(self._content[key], dict):
            raise self._unknown(key, "", TABLES)
        if key in known:
            place = self._place("", key)
            raise ConfigFileError(f"{place}: {key} belongs in a table, such as [{own}]")
        raise self._unknown("", key, [*COMMON, *known])

    def _table(self, name: str) -> dict[str, Any]:
        table = self._content.get(name, {})
        if not isinstance(table, dict):
            raise ConfigFileError(f"{self._place('', name)}: {name} must be a table: [{name}]")
        return table

    def _place(self, table: str, key: str) -> str:
        """As exact as it can be told: how a key is written decides whether its line is found."""
        line = self._lines.get((table, key))
        return f"{self._path}:{line}" if line else f"{self._path}{f' [{table}]' if table else ''}"

    def _unknown(self, table: str, key: str, right: Iterable[str]) -> ConfigFileError:
        if not key:
            what = f"table [{table}]"
        else:
            what = f"setting {key} in [{table}]" if table else f"common setting {key}"
        hint = nearest(key or table, right)
        return ConfigFileError(f"{self._place(table, key)}: there is no {what}{hint}")


def nearest(wrong: str, right: Iterable[str], prefix: str = "") -> str:
    """A hint to append to a refusal; empty if nothing right is near. All names have the `prefix`
    besides."""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _lines(text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """The line of each table and key that is written the plain way."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _TABLE.match(line):
            table = found[1]
            yield (table, ""), number
        elif found := _KEY.match(line):
            yield (table, found[1]), number
