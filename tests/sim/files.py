"""A disk in memory, on virtual time: slow, full, failing, torn or lying when told to be."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TypeVar

from common.config import StartError

T = TypeVar("T")

FAULTS = (
    "slow",  # the work takes `slowness` times as long
    "full",  # a write ends early: no space left
    "write_error",  # a write does nothing and fails
    "read_error",  # a read fails
    "torn",  # a part of a write lands, then it fails
    "lost",  # a part of a write lands, and nobody is told
    "flipped",  # a read brings one byte changed
)


class SimDrive:
    """What is on the disk of one host; it outlives the processes. Faults count as they strike.

    `on` holds the faults that strike every time, `next` those that strike so many times more.
    """

    def __init__(
        self, seed: int, *, latency_s: float = 1e-4, bytes_per_s: float = 1e9, slowness: float = 100
    ) -> None:
        self.contents: dict[str, bytearray] = {}  # by path
        self.on: set[str] = set()
        self.next: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.locks: dict[str, SimFiles] = {}
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.slowness = slowness
        self.random = random.Random(seed)
        self._last_write = ("", 0, 0)  # path, first byte, end

    def strikes(self, fault: str) -> bool:
        """Whether the fault strikes now; then it counts."""
        assert fault in FAULTS
        if fault not in self.on:
            if not self.next[fault]:
                return False
            self.next[fault] -= 1
        self.struck[fault] += 1
        return True

    def put(self, path: str, offset: int, data: bytes) -> None:
        """What a write does to a file."""
        content = self.contents.setdefault(path, bytearray())
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data
        self._last_write = (path, offset, offset + len(data))

    def lose_power(self) -> None:
        """The file written last ends somewhere within its last write."""
        path, start, end = self._last_write
        if path in self.contents and end > start:
            del self.contents[path][self.random.randrange(start, end) :]
            self.struck["power_lost"] += 1


class SimFiles:
    """One process's view of the drive (common.seams.Files)."""

    def __init__(self, drive: SimDrive) -> None:
        self._drive = drive
        self._turn = asyncio.Lock()
        self._num_bytes = 0  # moved by the work that runs
        self._is_gone = False

    async def run(self, work: Callable[[], T]) -> T:
        task = asyncio.ensure_future(self._take_turn(work))
        cancelled = False
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            if not task.cancelled():
                task.exception()
            raise asyncio.CancelledError
        return task.result()

    async def _take_turn(self, work: Callable[[], T]) -> T:
        async with self._turn:
            factor = self._drive.slowness if self._drive.strikes("slow") else 1.0
            await asyncio.sleep(self._drive.latency_s * factor)
            if self._is_gone:
                raise asyncio.CancelledError  # nobody is there to do it
            self._num_bytes = 0
            try:
                return work()
            finally:
                await asyncio.sleep(self._num_bytes / self._drive.bytes_per_s * factor)

    def lock_folder(self, folder: str) -> None:
        if self._drive.locks.setdefault(folder, self) is not self:
            raise StartError(f"another process uses the folder {folder}: give each store its own")

    def list_folder(self, folder: str) -> dict[str, int]:
        self._fail_if("read_error")
        return {
            PurePath(path).name: len(content)
            for path, content in self._drive.contents.items()
            if PurePath(path).parent == PurePath(folder)
        }

    def read(self, path: str, offset: int, parts: Sequence[memoryview]) -> int:
        self._fail_if("read_error")
        if path not in self._drive.contents:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        wanted = sum(part.nbytes for part in parts)
        data = bytearray(self._drive.contents[path][offset : offset + wanted])
        if data and self._drive.strikes("flipped"):
            data[self._drive.random.randrange(len(data))] ^= self._drive.random.randrange(1, 256)
        self._num_bytes += len(data)
        start = 0
        for part in parts:
            piece = data[start : start + part.nbytes]
            part[: len(piece)] = piece
            start += len(piece)
        return len(data)

    def write(self, path: str, offset: int, parts: Sequence[memoryview]) -> None:
        drive = self._drive
        self._fail_if("write_error")
        data = b"".join(parts)
        full, torn, lost = (drive.strikes(fault) for fault in ("full", "torn", "lost"))
        if full or torn or lost:
            data = data[: drive.random.randrange(len(data))]
        drive.put(path, offset, data)
        self._num_bytes += len(data)
        if full or torn:
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), path)

    def save(self, path: str, content: bytes) -> None:
        self.write(path + ".new", 0, [memoryview(content)])
        self._drive.contents[path] = self._drive.contents.pop(path + ".new")

    def remove(self, path: str) -> None:
        self._fail_if("write_error")
        self._drive.contents.pop(path, None)

    def close(self) -> None:
        """The process has ended, in order or not: what it had not begun is not done."""
        self._is_gone = True
        for folder in [folder for folder, owner in self._drive.locks.items() if owner is self]:
            del self._drive.locks[folder]

    def _fail_if(self, fault: str) -> None:
        if self._drive.strikes(fault):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
