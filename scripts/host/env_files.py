"""The settings of the units of a host, read as systemd reads them. Pure, but for reading files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_INSTANCE = re.compile(r"(gateway|kvstore|prefill|decode)-(\d+)\.env")


def parse_env(text: str) -> dict[str, str]:
    """The assignments of an EnvironmentFile, systemd.exec(5): the last one of a name counts. Values
    that go on in a second line are not understood."""
    values = {}
    for line in text.splitlines():
        name, assigned, value = line.strip().partition("=")
        if assigned and not name.startswith(("#", ";")):
            values[name.strip()] = _unquoted(value.strip())
    return values


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if is_quoted else value


def instances(
    folder: Path, roles: tuple[str, ...], environ: Mapping[str, str]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Role, name and settings of each process of this host. Without files for a role it has one
    instance, with the settings of the environment."""
    found = sorted(_numbers(folder, roles))
    for role in roles:
        if all(each != role for each, _ in found):
            yield role, f"{role}.1", dict(environ)
    for role, number in found:
        settings = dict(environ)
        for name in ("common", role, f"{role}-{number}"):
            path = folder / f"{name}.env"
            if path.exists():
                settings |= parse_env(path.read_text())
        yield role, f"{role}.{number}", settings


def _numbers(folder: Path, roles: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for path in folder.glob("*.env") if folder.is_dir() else ():
        match = _INSTANCE.fullmatch(path.name)
        if match is not None and match[1] in roles:
            yield match[1], int(match[2])
