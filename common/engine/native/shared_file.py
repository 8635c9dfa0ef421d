"""Bytes that are made once and then mapped by every process of this user: packed weights.

They lie in files of the cache folder, so that the memory is the system's page cache: shared, and
given back where something else needs it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from common.engine.native.library import cache_folder

log = structlog.get_logger()

_SUFFIX = ".packed"
_KEPT = 4  # files; those used longest ago go first
_WORTH_BYTES = 64 << 20  # less is packed again in a blink

Fill = Callable[[mmap.mmap], None]


def shared_bytes(key: str, num_bytes: int, fill: Fill) -> mmap.mmap:
    """`num_bytes` as `fill` makes them: mapped from the file of this key, made first if need be.

    One process at a time makes them; the others wait. What the caller writes to its mapping stays
    its own. Few bytes are private, and so are all where no file can be had: the log says so.
    """
    if num_bytes < _WORTH_BYTES:
        return _private(num_bytes, fill)
    try:
        folder = cache_folder()
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = folder / (key + _SUFFIX)
            if not path.exists() or path.stat().st_size != num_bytes:
                _make(path, num_bytes, fill)
            os.utime(path)
            _prune(folder)
            return _map(path)
    except OSError as error:
        log.warning("packed_weights_not_shared", reason=str(error), num_bytes=num_bytes)
        return _private(num_bytes, fill)


def _make(path: Path, num_bytes: int, fill: Fill) -> None:
    """Complete and on disk before it has its name: a crash leaves no half-made file."""
    begun = time.monotonic()
    made = path.with_suffix(f".{os.getpid()}")
    try:
        with made.open("w+b") as file:
            os.posix_fallocate(
                file.fileno(), 0, num_bytes
            )  # a full disk is an error here, not later
            with mmap.mmap(file.fileno(), num_bytes) as memory:
                fill(memory)
                memory.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    seconds = round(time.monotonic() - begun, 2)
    log.info("packed_weights_made", path=str(path), num_bytes=num_bytes, seconds=seconds)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _private(num_bytes: int, fill: Fill) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    fill(memory)
    return memory


def _prune(folder: Path) -> None:
    """A file that is still mapped somewhere lives on until it is not."""
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_KEPT]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
