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
from pathlib import Path

from common.config import StartError

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


class ArenaError(StartError):
    """The arena cannot be made or mapped; the message says what to do."""


class LiveDisk:
    """Arenas as memory-mapped files, mode 0600."""

    def create_arena(self, path: str, num_bytes: int) -> memoryview:
        """Reserve every page now: a full /dev/shm is an error here and not a SIGBUS later.

        The file stays locked while it is mapped, which tells that its owner is alive: the mapping
        keeps a duplicate of the descriptor, and the lock goes with the last of these.
        """
        descriptor = self._create(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(descriptor, 0, num_bytes)
            return memoryview(mmap.mmap(descriptor, num_bytes))
        except (OSError, OverflowError) as error:
            self.remove_arena(path)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _no_room(path, num_bytes) from error
            raise ArenaError(f"cannot reserve {num_bytes} bytes in {path}: {error}") from error
        finally:
            os.close(descriptor)

    def sweep_arenas(self, folder: str) -> list[str]:
        swept = []
        for path in Path(folder).glob(ARENA_PREFIX + "*"):
            try:
                descriptor = os.open(path, os.O_RDWR)
            except OSError:
                continue  # another user's, or gone by now
            try:
                if not os.fstat(descriptor).st_size:
                    continue  # just made, and not locked yet
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                swept.append(str(path))
            except BlockingIOError:
                pass  # its owner is alive
            finally:
                os.close(descriptor)
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
        """A descriptor of a new, empty file that only its owner may open."""
        try:
            Path(path).unlink(missing_ok=True)
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise ArenaError(f"cannot create the KV arena {path}: {error.strerror}") from error

    def _open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR)
        except OSError as error:
            raise ArenaError(f"cannot open the KV arena {path}: {error.strerror}") from error


def _no_room(path: str, num_bytes: int) -> ArenaError:
    folder = Path(path).parent
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    return ArenaError(
        f"{folder} has {free} bytes free but the KV arena needs {num_bytes}: make it larger "
        f"(mount -o remount,size={num_bytes + (1 << 26)} {folder}), ask for less with --kv-bytes, "
        f"or put the arena elsewhere with --arena-dir /var/tmp (a disk-backed file is slower)"
    )
