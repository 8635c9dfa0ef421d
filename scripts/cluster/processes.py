"""Processes that end with their parents, and the descendants of this one. Linux only."""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when the parent's thread that made it ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class ProcessInfo(NamedTuple):
    """A process as /proc shows it."""

    pid: int
    parent: int
    session: int
    is_zombie: bool


def process_info(pid: int) -> ProcessInfo | None:
    """None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, _, session = stat.rpartition(")")[2].split()[:4]  # the name may hold blanks
    return ProcessInfo(pid, int(parent), int(session), state == "Z")


def descendants(ancestor: int) -> list[ProcessInfo]:
    """Children of `ancestor`, their children, and so on."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    by_parent: dict[int, list[ProcessInfo]] = {}
    for info in filter(None, map(process_info, pids)):
        by_parent.setdefault(info.parent, []).append(info)
    found: list[ProcessInfo] = []
    parents = [ancestor]
    while parents:
        children = by_parent.get(parents.pop(), [])
        found += children
        parents += [child.pid for child in children]
    return found


def wait_for_descendants(timeout_s: float) -> list[int]:
    """Wait until this process has no live descendant, and reap those that became its children.
    Returns the ids of those that still live after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        _reap()
        pids = [info.pid for info in descendants(os.getpid()) if not info.is_zombie]
        left_s = deadline - time.monotonic()
        if not pids or left_s <= 0:
            return pids
        _wait_for_any(pids, left_s)


def kill_descendants(timeout_s: float) -> list[int]:
    """Send SIGKILL to every descendant and wait for them. Returns those that were killed."""
    killed: list[int] = []
    deadline = time.monotonic() + timeout_s
    pids = wait_for_descendants(0)
    while pids and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed += [pid for pid in pids if pid not in killed]
        pids = wait_for_descendants(0.1)  # again: one of them may have made another meanwhile
    return killed


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def wait_for_end(child: int, interrupt: int) -> bool:
    """Wait until the process `child`, which nobody has reaped, has ended. Returns False as soon as
    the descriptor `interrupt` can be read."""
    pidfd = os.pidfd_open(child)
    try:
        return interrupt not in readable([pidfd, interrupt])
    finally:
        os.close(pidfd)


def signal_descriptor() -> int:
    """A descriptor that can be read from the first signal on that Python has a handler for, also
    where that handler has not run yet."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    return read_end


def readable(descriptors: Sequence[int], timeout_s: float | None = None) -> list[int]:
    """Wait until one of these can be read, as a pidfd can when its process ends; returns which."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    timeout_ms = None if timeout_s is None else math.ceil(timeout_s * 1000)
    return [descriptor for descriptor, _ in poller.poll(timeout_ms)]


def _wait_for_any(pids: list[int], timeout_s: float) -> None:
    """Wait until the first of these processes ends."""
    pidfds = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
        if len(pidfds) == len(pids):
            readable(pidfds, timeout_s)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
