"""What a process says of its pool of device memory, in a file that others read while it lives.

A file is locked by its owner, which tells that the owner is alive, and has its name only once it is
whole. Names that begin with a dot are unfinished files.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
from pathlib import Path

import msgspec
import numpy as np

from common.engine.cuda.ipc import SharingError
from common.engine.cuda.residency import NAME_ROWS, NAME_WORDS, NameArray
from common.kv.layout import KvLayout
from common.locks import sweep

_HEAD_BYTES = 4096
_LENGTH_BYTES = 4
_WORD_BYTES = np.dtype(np.uint64).itemsize


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool is mapped. `device` names the device; `handle` is for Sharing.open."""

    device: str
    layout: KvLayout
    num_blocks: int
    handle: bytes


def default_folder() -> Path:
    """In shared memory, one for each user."""
    return Path(f"/dev/shm/kvbaton-pools-{os.geteuid()}")  # noqa: S108 - shared memory


class OwnNotice:
    """Our file. `names` [NAME_ROWS, num_blocks] are those of what our blocks hold: residency.py."""

    def __init__(self, folder: Path, notice: Notice) -> None:
        """Raises SharingError for a folder that others may enter, OSError for lack of room."""
        _make_private(folder)
        for left in folder.glob(".*"):
            sweep(left)
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        unfinished = folder / f".{self.path.name}"
        self._file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.names = self._write(notice)
            unfinished.rename(self.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            os.close(self._file)
            raise

    def _write(self, notice: Notice) -> NameArray:
        head = msgspec.msgpack.encode(notice)
        num_bytes = _HEAD_BYTES + notice.num_blocks * NAME_ROWS * _WORD_BYTES
        os.posix_fallocate(self._file, 0, num_bytes)
        memory = mmap.mmap(self._file, num_bytes)
        memory[: _LENGTH_BYTES + len(head)] = len(head).to_bytes(_LENGTH_BYTES, "little") + head
        return _names(memory, notice.num_blocks)

    def close(self) -> None:
        """The names go first: whoever copies just now sees that."""
        self.names[:NAME_WORDS] = 0
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the mapping keeps a duplicate of the descriptor
        os.close(self._file)


def read_notice(file: int) -> tuple[Notice, NameArray]:
    """Another's, and the names of its blocks as they are at any time. Raises ValueError (also
    msgspec's) for a file that is not what it should be."""
    memory = mmap.mmap(file, 0)
    length = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    end = min(_LENGTH_BYTES + length, _HEAD_BYTES)
    notice = msgspec.msgpack.decode(memory[_LENGTH_BYTES:end], type=Notice)
    return notice, _names(memory, notice.num_blocks)


def _names(memory: mmap.mmap, num_blocks: int) -> NameArray:
    """Raises ValueError where the file is too short for so many."""
    count = num_blocks * NAME_ROWS
    words = np.frombuffer(memory, dtype=np.uint64, count=count, offset=_HEAD_BYTES)
    return words.reshape(NAME_ROWS, num_blocks)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    stats = folder.lstat()
    if not stat.S_ISDIR(stats.st_mode) or stats.st_uid != os.geteuid() or stats.st_mode & 0o077:
        raise SharingError(f"{folder} must be a folder that no other user may enter")
