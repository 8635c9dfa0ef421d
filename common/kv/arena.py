"""The arena: KV blocks in a file of shared memory that every worker of the host maps.

A plain file under /dev/shm instead of multiprocessing.shared_memory, whose resource tracker may
unlink a segment that belongs to another process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from common.config import StartError
from common.locks import sweep

_MAP_FIXED = 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


ARENA_PREFIX = "kvbaton-arena-"
JOURNAL_SUFFIX = ".journal"  # of what tells the next store what an arena holds


class ArenaError(StartError):
    """The arena cannot be made or mapped; the message says what to do."""


class NoArenaError(ArenaError):
    """There is none of this name: its store has ended, or is on another machine."""


class NoRoomError(ArenaError):
    """There is too little room for the arena."""


class LiveDisk:
    """Arenas as memory-mapped files, mode 0600.

    A file is locked while its owner maps it, which tells that the owner is alive: the mapping keeps
    a duplicate of the descriptor, and the lock goes with the last of these. Whoever removes or
    replaces one that was left has locked it before.
    """

    def create_arena(self, path: str, num_bytes: int) -> memoryview:
        """Reserve every page now: a full /dev/shm is an error here and not a SIGBUS later."""
        descriptor = self._create(path)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return memoryview(mmap.mmap(descriptor, num_bytes))
        except (OSError, OverflowError) as error:
            self.remove_arena(path)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _no_room(path, num_bytes) from error
            raise ArenaError(f"cannot reserve {num_bytes} bytes in {path}: {error}") from error
        finally:
            os.close(descriptor)

    def open_arena(self, path: str, num_bytes: int = 0) -> memoryview | None:
        descriptor = self._take(path)
        if descriptor is None:
            return None
        try:
            size = os.fstat(descriptor).st_size
            fits = size > 0 and num_bytes in (0, size)
            return memoryview(mmap.mmap(descriptor, size)) if fits else None
        finally:
            os.close(descriptor)

    def sweep_arenas(self, folder: str, *, keep_journaled: bool = False) -> list[str]:
        swept = []
        for path in sorted(Path(folder).glob(ARENA_PREFIX + "*")):
            arena = str(path).removesuffix(JOURNAL_SUFFIX)
            is_pair = Path(arena).exists() and Path(arena + JOURNAL_SUFFIX).exists()
            if not (keep_journaled and is_pair) and sweep(path):
                swept.append(str(path))
        return swept

    def reserve(self, num_bytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, num_bytes))

    def map_into(self, memory: memoryview, offset: int, path: str, most_bytes: int) -> None:
        descriptor = self._open(path)
        try:
            # The store need not fill its file with whole blocks: what is left over has no use.
            num_bytes = min(os.fstat(descriptor).st_size, most_bytes)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if _LIBC.mmap(start, num_bytes, protection, flags, descriptor, 0) != start:
                reason = os.strerror(ctypes.get_errno())
                raise ArenaError(f"cannot map the KV arena {path}: {reason}")
        finally:
            os.close(descriptor)

    def remove_arena(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def _create(self, path: str) -> int:
        """A descriptor of a new, empty file that only its owner may open, locked."""
        left = self._take(path)
        try:
            Path(path).unlink(missing_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise ArenaError(f"cannot create the KV arena {path}: {error.strerror}") from error
        finally:
            if left is not None:
                os.close(left)
        _lock(path, descriptor)
        return descriptor

    def _take(self, path: str) -> int | None:
        """A descriptor of the file there, locked; None if it is none of ours."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return None
        stats = os.fstat(descriptor)
        is_ours = stat.S_ISREG(stats.st_mode) and stats.st_uid == os.geteuid()
        if not is_ours or stats.st_mode & 0o077:
            os.close(descriptor)
            return None
        _lock(path, descriptor)
        return descriptor

    def _open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR)
        except OSError as error:
            kind = NoArenaError if isinstance(error, FileNotFoundError) else ArenaError
            raise kind(f"cannot open the KV arena {path}: {error.strerror}") from error


def _lock(path: str, descriptor: int) -> None:
    """Whoever has the lock owns the arena of this name. Raises ArenaError, and closes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
            return
    except OSError:  # locked, or removed meanwhile
        pass
    os.close(descriptor)
    raise ArenaError(
        f"another process uses the KV arena {path}: give each store its own --name or --bind"
    )


def _no_room(path: str, num_bytes: int) -> NoRoomError:
    folder = Path(path).parent
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    return NoRoomError(
        f"{folder} has {free} bytes free but the KV arena needs {num_bytes}: make it larger "
        f"(mount -o remount,size={num_bytes + (1 << 26)} {folder}), ask for less with --kv-bytes, "
        f"or put the arena elsewhere with --arena-dir /var/tmp (a disk-backed file is slower)"
    )
