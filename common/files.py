"""The live disk: one thread of its own does all the work that may block."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from common.config import StartError

T = TypeVar("T")

_MOST_PARTS = 1024  # IOV_MAX of Linux


class LiveFiles:
    """common.seams.Files over the operating system's page cache."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._locks: dict[str, int] = {}  # folder -> its descriptor

    async def run(self, work: Callable[[], T]) -> T:
        job = self._executor.submit(work)
        future = asyncio.wrap_future(job)
        cancelled = False
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                cancelled = True
                job.cancel()  # has an effect only on what has not begun
        if cancelled:
            if not future.cancelled():
                future.exception()  # seen: the caller is told of the cancellation instead
            raise asyncio.CancelledError
        return future.result()

    def lock_folder(self, folder: str) -> None:
        if folder in self._locks:
            return
        try:
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                Path(folder).mkdir(mode=0o700)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StartError(f"cannot use the folder {folder}: {error.strerror}") from error
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                raise StartError(
                    f"others may enter the folder {folder}: chmod 700 it, or name another"
                )
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StartError(
                f"another process uses the folder {folder}: give each store its own"
            ) from error
        except (StartError, OSError):
            os.close(descriptor)
            raise
        self._locks[folder] = descriptor

    def list_folder(self, folder: str) -> dict[str, int]:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, path: str, offset: int, parts: Sequence[memoryview]) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _transfer(os.preadv, descriptor, offset, parts)
        finally:
            os.close(descriptor)

    def write(self, path: str, offset: int, parts: Sequence[memoryview]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            _transfer(os.pwritev, descriptor, offset, parts)
        finally:
            os.close(descriptor)

    def save(self, path: str, content: bytes) -> None:
        unfinished = path + ".new"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _transfer(os.pwritev, descriptor, 0, [memoryview(content)])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        Path(unfinished).rename(path)
        folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()


def _transfer(
    move: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    offset: int,
    parts: Sequence[memoryview],
) -> int:
    """Read or write the parts, however few bytes the system moves at a time; returns how many were
    moved before it moved none."""
    waiting = list(parts)
    num_moved = 0
    while waiting:
        num_bytes = move(descriptor, waiting[:_MOST_PARTS], offset + num_moved)
        if not num_bytes:
            break
        num_moved += num_bytes
        while waiting and num_bytes >= waiting[0].nbytes:
            num_bytes -= waiting.pop(0).nbytes
        if waiting:
            waiting[0] = waiting[0][num_bytes:]
    return num_moved
