"""How this process keeps the memory that it frees."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20


def keep_large_frames() -> None:
    """Let malloc keep freed frames of block bytes for the next ones.

    glibc takes each from the system and gives it back, so that every page of it faults anew: that
    halves the rate at which blocks move. Other C libraries have no such setting.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
