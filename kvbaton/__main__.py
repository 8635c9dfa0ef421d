"""`python -m kvbaton`: asks a running cluster whether its books close, and what happened to what.

Exit status of `audit`: 0 if the books close, 1 if not, 2 if that could not be found out. Of `why`:
0 if something is remembered, 1 if not, 2 if that could not be found out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kvbaton.ask import audit, why_block, why_request
from kvbaton.client import DEFAULT_ENDPOINT
from kvbaton.errors import ConnectionLostError, ForbiddenError, KvbatonError
from kvbaton.keys import KEYS_VARIABLE
from kvbaton.protocol import Audited, Told
from kvbaton.tables import Part, audit_parts, draw, plain_lines, why_parts

KEY_FILE_VARIABLE = "KVBATON_ADMIN_KEY_FILE"
DEFAULT_KEY_FILE = Path(".run/admin-key")  # where the checkout's own clusters have theirs
DEFAULT_KEYS = Path(".run/keys")
EXIT_CANNOT_ASK = 2

_BLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,9})")


class _CannotAskError(Exception):
    """The message says why, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        key = _admin_key(options.admin_key_file)
        return _audit(options, key) if options.command == "audit" else _why(options, key)
    except _CannotAskError as error:
        reason = str(error)
    except ForbiddenError as error:
        at_fault = f"the key is from {_key_file(options.admin_key_file)}"
        if error.field != "admin_key":
            at_fault = f"the keys are {_keys(options) or 'none'}, --keys names others"
        reason = f"{error.message} ({at_fault})"
    except ConnectionLostError as error:
        reason = f"{error.message}: is there a gateway? --gateway names another"
    except KvbatonError as error:
        reason = error.message
    print(f"kvbaton {options.command}: {reason}", file=sys.stderr)
    return EXIT_CANNOT_ASK


def _audit(options: argparse.Namespace, key: str) -> int:
    answer = audit(options.gateway, key, _keys(options))
    _show(answer, audit_parts(answer), as_json=options.json)
    if any(store.problem for store in answer.stores):
        return EXIT_CANNOT_ASK
    return 0 if answer.closes else 1


def _why(options: argparse.Namespace, key: str) -> int:
    match = None if options.request else _BLOCK.fullmatch(options.what)
    if match is None:
        answer = why_request(options.gateway, key, options.what, _keys(options))
    else:
        store, block = match.groups()
        number = None if store is None else int(store)
        answer = why_block(options.gateway, key, int(block), number, _keys(options))
    _show(answer, why_parts(answer), as_json=options.json)
    if problems := [each.problem for each in answer.stores if each.problem]:
        raise _CannotAskError(f"not every KV store could be asked: {problems[0]}")
    return 0 if any(store.events for store in answer.stores) else 1


def _show(answer: Audited | Told, parts: Iterator[Part], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
    elif not (sys.stdout.isatty() and draw(parts)):
        for line in plain_lines(parts):
            print(line)


def _key_file(given: Path | None) -> Path:
    named = os.environ.get(KEY_FILE_VARIABLE)
    return given or (Path(named) if named else DEFAULT_KEY_FILE)


def _keys(options: argparse.Namespace) -> str:
    """What connects to the gateway; "" for nothing."""
    default = str(DEFAULT_KEYS) if DEFAULT_KEYS.exists() else ""
    named: str | None = options.keys
    return os.environ.get(KEYS_VARIABLE, default) if named is None else named


def _admin_key(given: Path | None) -> str:
    path = _key_file(given)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise _CannotAskError(
            f"no admin key: {path} cannot be read ({error}). Name the file that the gateway was "
            f"started with: --admin-key-file FILE or {KEY_FILE_VARIABLE}"
        ) from error


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--gateway", metavar="ENDPOINT", default=DEFAULT_ENDPOINT, help="(default: %(default)s)"
    )
    shared.add_argument(
        "--admin-key-file",
        metavar="FILE",
        type=Path,
        help=f"the gateway's admin key (default: {KEY_FILE_VARIABLE}, then {DEFAULT_KEY_FILE})",
    )
    shared.add_argument(
        "--keys",
        metavar="PATH",
        help="admin.key of the cluster, or the folder that it is in; '' for a cluster without keys "
        f"(default: {KEYS_VARIABLE}, then {DEFAULT_KEYS})",
    )
    shared.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser = argparse.ArgumentParser(prog="python -m kvbaton", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "audit",
        parents=[shared],
        help="whether the books close: every KV block has an owner who agrees",
        description="Exits with 0 if the books close, 1 if not, 2 if that could not be found out.",
    )
    why = commands.add_parser(
        "why",
        parents=[shared],
        help="what happened to a block or a request",
        description="Exits with 0 if anything is remembered, 1 if not, 2 if it could not be asked.",
    )
    why.add_argument(
        "what",
        metavar="BLOCK|REQUEST",
        help="a block such as 17, or 1:17 of KV store 1; or a request's or handoff's id",
    )
    why.add_argument("--request", action="store_true", help="it is a request, also if a number")
    return parser


if __name__ == "__main__":
    sys.exit(main())
