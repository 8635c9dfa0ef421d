"""`scripts/install`: lays kvbaton out on a host, with systemd units.

It starts and enables nothing: it prints the commands for that. It needs Python's own library only.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.cluster.identity import ROLES, ROOT
from scripts.cluster.ports import ClusterError
from scripts.host.files import Manifest, Tree
from scripts.host.layout import DEFAULT_PREFIX, SETTINGS, STATE, Wanted, entries, unit_names

EXIT_FAILED = 1
EXIT_USAGE = 2

_EPILOG = """\
A second run changes what differs: that is how one upgrades. Settings that are there stay.
docs/systemd.md leads from bare machines to a cluster.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 with the reason on stderr, 2 for wrong options."""
    options = _parser().parse_args(argv)
    try:
        return _uninstall(options) if options.uninstall else _install(options)
    except ClusterError as error:
        print(f"scripts/install: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"scripts/install: {error}", file=sys.stderr)
        return EXIT_FAILED


def _install(options: argparse.Namespace) -> int:
    counts = role_counts(options.role, options.instances)
    http = _http(options.http)
    wanted = Wanted(options.prefix, counts, options.address, http, options.stores)
    tree = _tree(options)
    if tree.at(options.prefix) == ROOT:
        raise ClusterError(f"--prefix {options.prefix} is where this script is: use another one")
    if options.venv is not None and not (options.venv / "bin/python").exists():
        raise ClusterError(f"--venv {options.venv} holds no bin/python")
    venv = options.venv.absolute() if options.venv else None
    tree.install(entries(wanted, ROOT), venv)
    if options.dry_run:
        return 0
    if options.root == Path("/"):
        _make_environment(options.prefix, venv)
        _show_next(options.prefix, counts)
    elif venv is None:
        print(f"then, where it is to be: {options.prefix}/scripts/setup cluster")
    return 0


def _make_environment(prefix: Path, venv: Path | None) -> None:
    """Raises CalledProcessError."""
    if venv is None:
        subprocess.run([prefix / "scripts/setup", "cluster"], check=True)
    # The services may not write what Python compiles, and would compile it at each start.
    folders = [prefix / name for name in ("common", "kvbaton", "scripts", "services")]
    subprocess.run([prefix / ".venv/bin/python", "-m", "compileall", "-q", *folders], check=True)


def _show_next(prefix: Path, counts: dict[str, int]) -> None:
    keys = SETTINGS / "keys"
    print("next:")
    print("  systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload")
    if not (keys / "public.json").exists():
        print(f"  {prefix}/scripts/keygen {keys}, once for the whole cluster; on its other hosts")
        names = ", ".join([*(f"{role}.key" for role in counts), "public.json"])
        print(f"  install -d -m 700 {keys}, and copy {names} there")
    print(f"  {prefix}/scripts/doctor --role {','.join(counts)}")
    print(f"  systemctl enable --now {shlex.join(['kvbaton.target', *unit_names(counts)])}")


def _uninstall(options: argparse.Namespace) -> int:
    tree = _tree(options)
    if Manifest.read(tree.manifest_file) is None:
        raise ClusterError(f"--prefix {options.prefix}: nothing is installed there")
    shared_memory = tree.at("/dev/shm")  # noqa: S108 the arenas' folder unless settings say otherwise
    arenas = [
        Path("/") / path.relative_to(options.root)
        for path in sorted(shared_memory.glob("kvbaton-arena-*"))
    ]
    tree.uninstall(purge=[SETTINGS, *STATE, *arenas] if options.purge else [])
    return 0


def _tree(options: argparse.Namespace) -> Tree:
    def say(what: str, path: Path) -> None:
        print(f"{what} {path}")

    return Tree(options.root, options.prefix, say, dry=options.dry_run)


def role_counts(roles: str, instances: str) -> dict[str, int]:
    """How many instances of each role. Raises ClusterError."""
    names = [name.strip() for name in roles.split(",")]
    if unknown := [name for name in names if name not in ROLES]:
        raise ClusterError(f"--role takes {', '.join(ROLES)}, got {unknown[0]!r}")
    counts = dict.fromkeys(names, 1)
    for part in filter(None, instances.split(",")):
        role, _, number = part.partition("=")
        if role not in counts or not number.isdecimal() or not 1 <= int(number) <= 99:
            raise ClusterError(
                f"--instances takes ROLE=N for roles of --role, N from 1 to 99, got {part!r}"
            )
        counts[role] = int(number)
    return counts


def _http(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ClusterError(f"--http must be ADDRESS:PORT, got {text!r}")
    return host, int(port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/install",
        description="Lay kvbaton out on this host: code, environment, settings and systemd units.",
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prefix", metavar="DIR", type=Path, default=DEFAULT_PREFIX, help="default: %(default)s")
    add("--role", metavar="ROLE,...", default=",".join(ROLES), help="default: all, %(default)s")
    add("--instances", metavar="ROLE=N,...", default="", help="default: one of each role")
    add("--address", metavar="ADDR", default="127.0.0.1", help="of this host, for the others")
    add("--http", metavar="ADDR:PORT", default="127.0.0.1:8000", help="where gateways listen")
    add("--stores", metavar="ENDPOINTS", default="", help="KV stores (default: this host's)")
    add("--venv", metavar="DIR", type=Path, help="link this environment instead of making one")
    add("--root", metavar="DIR", type=Path, default=Path("/"), help="put everything below DIR")
    add("--dry-run", action="store_true", help="say what would be done")
    add("--uninstall", action="store_true", help="remove all but settings that were changed")
    add("--purge", action="store_true", help="with --uninstall: settings, keys and caches too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
