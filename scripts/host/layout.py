"""What an installation consists of, and where each part goes. Pure, but for reading the checkout.

Code, model and environment lie below the prefix like in a checkout, so that its scripts work there
too. Settings are in /etc/kvbaton, units where systemd looks for those of the administrator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.cluster.identity import ROLES
from scripts.cluster.ports import ClusterError, client_port, store_ports

DEFAULT_PREFIX = Path("/opt/kvbaton")
SETTINGS = Path("/etc/kvbaton")
UNITS = Path("/etc/systemd/system")
STATE = (Path("/var/lib/kvbaton"), Path("/var/cache/kvbaton"))
CODE = ("common", "docs", "kvbaton", "models/demo", "scripts", "services")
MANIFEST = ".installed.json"

_SINGLE_FILES = ("LICENSE", "README.md", "pyproject.toml")
_UNIT_FOLDER = Path("scripts/systemd")
_SOCKET = "kvbaton-gateway.socket"
_ELSEWHERE = {
    "kvbaton.sysusers": Path("/etc/sysusers.d/kvbaton.conf"),
    "kvbaton.tmpfiles": Path("/etc/tmpfiles.d/kvbaton.conf"),
}
_SAFE_PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")  # no more than what a unit takes without quotes
_ADDRESS = re.compile(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]")


@dataclass(frozen=True)
class Wanted:
    """What was asked for. `counts`: instances of each role on this host. `address`: where other
    processes reach those of this host. `http`: where the gateways listen, as address and port.
    `stores`: endpoints of the KV stores; "" for those of this host."""

    prefix: Path
    counts: Mapping[str, int]
    address: str = "127.0.0.1"
    http: tuple[str, int] = ("127.0.0.1", 8000)
    stores: str = ""

    def check(self) -> None:
        """Raises ClusterError, which names the option."""
        if not _SAFE_PATH.fullmatch(str(self.prefix)):
            raise ClusterError(
                f"--prefix must be an absolute path of letters, digits, . _ -, got {self.prefix}"
            )
        for option, address in (("--address", self.address), ("--http", self.http[0])):
            if not _ADDRESS.fullmatch(address):
                raise ClusterError(
                    f"{option} must be a name or an address, with IPv6 in brackets, got {address!r}"
                )
        if not self.stores and not self.counts.get("kvstore"):
            raise ClusterError("--stores: without a KV store on this host, name those of others")


@dataclass(frozen=True)
class Entry:
    """A file of the installation: `path` as it is to be, and either a `source` or a `text`.

    A setting is the operator's once it is there: it is not written again."""

    path: Path
    source: Path | None = None
    text: str = ""
    is_setting: bool = False
    is_executable: bool = False

    def content(self) -> bytes:
        """Raises OSError."""
        return self.text.encode() if self.source is None else self.source.read_bytes()


def entries(wanted: Wanted, checkout: Path) -> list[Entry]:
    """Every file. Raises ClusterError or OSError."""
    wanted.check()
    return [*_code(wanted, checkout), *_units(wanted, checkout), *_settings(wanted)]


def unit_names(counts: Mapping[str, int]) -> list[str]:
    """What is to be enabled: each instance, and the socket of the gateways."""
    names = [
        f"kvbaton-{role}@{number}.service"
        for role, count in counts.items()
        for number in range(1, count + 1)
    ]
    return [*([_SOCKET] if counts.get("gateway") else []), *names]


def _code(wanted: Wanted, checkout: Path) -> Iterator[Entry]:
    sources = [checkout / name for name in _SINGLE_FILES]
    for folder in CODE:
        sources += [path for path in sorted((checkout / folder).rglob("*")) if path.is_file()]
    for source in sources:
        relative = source.relative_to(checkout)
        if "__pycache__" not in relative.parts:
            is_executable = bool(source.stat().st_mode & 0o100)
            yield Entry(wanted.prefix / relative, source, is_executable=is_executable)


def _units(wanted: Wanted, checkout: Path) -> Iterator[Entry]:
    folder = checkout / _UNIT_FOLDER
    unwanted = {f"kvbaton-{role}@.service" for role in ROLES if not wanted.counts.get(role)}
    unwanted |= set() if wanted.counts.get("gateway") else {_SOCKET}
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = source.relative_to(folder)
        if source.name not in unwanted:
            text = source.read_text().replace(str(DEFAULT_PREFIX), str(wanted.prefix))
            if source.name == _SOCKET:
                text = text.replace("127.0.0.1:8000", f"{wanted.http[0]}:{wanted.http[1]}")
            yield Entry(_ELSEWHERE.get(source.name, UNITS / relative), text=text)


# ---- settings -----------------------------------------------------------------------------------


def _settings(wanted: Wanted) -> Iterator[Entry]:
    yield _setting(
        "common",
        "all kvbaton services of this host",
        [
            f"KVBATON_MODEL={wanted.prefix}/models/demo",
            f"KVBATON_STORES={wanted.stores or ','.join(_own_stores(wanted))}",
            "#KVBATON_LOG_LEVEL=info",
        ],
    )
    for role, count in wanted.counts.items():
        for number in range(1, count + 1):
            lines = _lines(wanted, role, number)
            yield _setting(f"{role}-{number}", f"{role}.{number} alone", lines)


def _setting(name: str, whose: str, lines: list[str]) -> Entry:
    head = [
        f"# Settings of {whose}. Every flag of a service is a variable here:",
        "# see docs/operations.md. Read when a unit starts. No secrets: anybody may read this.",
    ]
    text = "".join(f"{line}\n" for line in [*head, *lines])
    return Entry(SETTINGS / f"{name}.env", text=text, is_setting=True)


def _own_stores(wanted: Wanted) -> list[str]:
    numbers = range(1, wanted.counts.get("kvstore", 0) + 1)
    ports = [store_ports(wanted.http[1], number).control for number in numbers]
    return [f"tcp://{wanted.address}:{port}" for port in ports]


def _lines(wanted: Wanted, role: str, number: int) -> list[str]:
    if role == "gateway":
        port = client_port(wanted.http[1], number)
        return [f"KVBATON_BIND=tcp://{wanted.address}:{port}"]
    if role == "kvstore":
        ports = store_ports(wanted.http[1], number)
        return [
            f"KVBATON_BIND=tcp://{wanted.address}:{ports.control}",
            f"KVBATON_DATA_BIND=tcp://{wanted.address}:{ports.data}",
            "#KVBATON_KV_BYTES=256M",
            "#KVBATON_DISK_DIR=/var/lib/kvbaton/disk",
        ]
    return [
        f"KVBATON_BIND=tcp://{wanted.address}:*",
        "KVBATON_THREADS=1",
        "#KVBATON_CPUS=0-3",
    ]
