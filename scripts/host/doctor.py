"""`scripts/doctor`: tells what is wrong with a host before kvbaton runs on it, and what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.cluster.ports import ClusterError
from scripts.cluster.terminal import DIM, RED, YELLOW, Screen
from scripts.host.checks import findings
from scripts.host.env_files import instances
from scripts.host.findings import ERROR, OK, WARNING, Finding
from scripts.host.gather import gather
from scripts.host.install import role_counts
from scripts.host.layout import SETTINGS

EXIT_UNWELL = 1
EXIT_USAGE = 2

GREEN = "32"

_STYLES = {OK: GREEN, WARNING: YELLOW, ERROR: RED}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something will not run, 2 for wrong options."""
    options = _parser().parse_args(argv)
    try:
        roles = tuple(role_counts(options.role, ""))
    except ClusterError as error:
        print(f"scripts/doctor: {error}", file=sys.stderr)
        return EXIT_USAGE
    processes = list(instances(options.settings, roles, os.environ))
    found = findings(gather(roles, processes, load_model=options.load_model))
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        _show(found, Screen(sys.stdout))
    return EXIT_UNWELL if any(each.level == ERROR for each in found) else 0


def _show(found: Sequence[Finding], screen: Screen) -> None:
    for finding in found:
        level = screen.styled(f"{finding.level:<8}", _STYLES[finding.level])
        screen.line(f"{level} {finding.subject:<10} {finding.message}")
        if finding.remedy:
            screen.line(screen.styled(f"{'':<20}-> {finding.remedy}", DIM))
    counts = {level: sum(each.level == level for each in found) for level in _STYLES}
    screen.line(", ".join(f"{count} {level}" for level, count in counts.items() if count))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/doctor",
        description="Look at this host: will kvbaton run here, and if not, what is to be done.",
        epilog="Exit status: 0, or 1 if there is an error.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--role", metavar="ROLE,...", default="gateway,kvstore,prefill,decode", help="default: all")
    add("--settings", metavar="DIR", type=Path, default=SETTINGS, help="default: %(default)s")
    add("--load-model", action="store_true", help="load the model, compute a token, compare")
    add("--json", action="store_true", help="print all findings as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
