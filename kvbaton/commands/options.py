"""What the commands have in common: where the gateway is, which keys to use, how to show."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvbaton.client import DEFAULT_ENDPOINT
from kvbaton.keys import KEYS_VARIABLE
from kvbaton.operator import Operator
from kvbaton.tables import Part, draw, plain_lines

KEY_FILE_VARIABLE = "KVBATON_ADMIN_KEY_FILE"
DEFAULT_KEY_FILE = Path(".run/admin-key")  # where the checkout's own clusters have theirs
DEFAULT_KEYS = Path(".run/keys")


class CannotAskError(Exception):
    """The message says why, and what to do."""


def gateway_options() -> argparse.ArgumentParser:
    """Options of every command that asks a gateway."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--gateway", metavar="ENDPOINT", default=DEFAULT_ENDPOINT, help="(default: %(default)s)"
    )
    shared.add_argument(
        "--keys",
        metavar="PATH",
        help="key file of the cluster, or the folder that it is in; '' for a cluster without keys "
        f"(default: {KEYS_VARIABLE}, then {DEFAULT_KEYS})",
    )
    shared.add_argument("--json", action="store_true", help="print the answer as JSON")
    return shared


def operator_options() -> argparse.ArgumentParser:
    """Those, and what makes the caller an operator."""
    shared = argparse.ArgumentParser(add_help=False, parents=[gateway_options()])
    shared.add_argument(
        "--admin-key-file",
        metavar="FILE",
        type=Path,
        help=f"the gateway's admin key (default: {KEY_FILE_VARIABLE}, then {DEFAULT_KEY_FILE})",
    )
    return shared


def operator_of(options: argparse.Namespace) -> Operator:
    """The connection that the options describe. Raises CannotAskError without an admin key."""
    path = key_file(options)
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CannotAskError(
            f"no admin key: {path} cannot be read ({error}). Name the file that the gateway was "
            f"started with: --admin-key-file FILE or {KEY_FILE_VARIABLE}"
        ) from error
    return Operator(options.gateway, key, keys(options))


def key_file(options: argparse.Namespace) -> Path:
    """Where the admin key is."""
    named = os.environ.get(KEY_FILE_VARIABLE)
    given: Path | None = options.admin_key_file
    return given or (Path(named) if named else DEFAULT_KEY_FILE)


def keys(options: argparse.Namespace) -> str:
    """What connects to the gateway; "" for nothing."""
    default = str(DEFAULT_KEYS) if DEFAULT_KEYS.exists() else ""
    named: str | None = options.keys
    return os.environ.get(KEYS_VARIABLE, default) if named is None else named


def show(answer: msgspec.Struct, parts: Iterable[Part], *, as_json: bool) -> None:
    """Print an answer: for people, as its parts, or whole as JSON."""
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
    elif not (sys.stdout.isatty() and draw(parts)):
        for line in plain_lines(parts):
            print(line)
