"""Which cores a process runs on."""

from __future__ import annotations

import os
import re

from common.config import StartError

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def parse_cpus(text: str) -> set[int]:
    """Cores as Linux lists them, such as 0-3,8. Raises StartError."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise StartError(f"--cpus must be cores such as 0-3,8, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise StartError(f"--cpus: {part.strip()} runs backwards")
        cpus.update(range(first, last + 1))
    return cpus


def run_on(text: str) -> None:
    """Keep this process on these cores; "" leaves it where it is. Raises StartError if one of them
    is not there, or not ours."""
    if not text:
        return
    cpus = parse_cpus(text)
    missing = cpus - os.sched_getaffinity(0)
    if missing:
        listed = ",".join(map(str, sorted(missing)))
        raise StartError(f"--cpus {text}: core {listed} is not one that this process may use")
    os.sched_setaffinity(0, cpus)
