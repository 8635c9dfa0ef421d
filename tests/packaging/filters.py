"""The filters of system calls that a unit asks for, as systemd would set them."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Callable, Sequence
from ctypes.util import find_library

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000 | errno.EPERM


def can_filter() -> bool:
    """Whether what it takes is here."""
    return bool(shutil.which("systemd-analyze") and find_library("seccomp"))


def allowed_calls(filters: Sequence[str]) -> set[str]:
    """The names in SystemCallFilter= settings: the first allows, those with ~ take away."""
    allowed: set[str] = set()
    for each in filters:
        names = _members(each.removeprefix("~").split())
        allowed = allowed - names if each.startswith("~") else allowed | names
    return allowed


def _members(names: Sequence[str]) -> set[str]:
    """Sets such as @system-service, with all in them."""
    sets = [name for name in names if name.startswith("@")]
    found = set(names) - set(sets)
    if sets:
        command = ["systemd-analyze", "syscall-filter", "--no-pager", *sets]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        inner = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        found |= _members([name for name in inner if not name.startswith("#")])
    return found


def filter_of(filters: Sequence[str]) -> Callable[[], None]:
    """Sets the filter for the process that calls it, and what it becomes."""
    library = ctypes.CDLL(find_library("seccomp"))
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_ERRNO))
    for name in allowed_calls(filters):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # this processor has it
            library.seccomp_rule_add(context, _ALLOW, number, 0)

    def load() -> None:
        if library.seccomp_load(context):
            raise OSError("the filter of system calls cannot be set")

    return load
