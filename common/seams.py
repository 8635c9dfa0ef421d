"""The seams between kvbaton and the world: time, chance, memory and processes of the host.

Services take these (and a Transport, common/net) as arguments and use nothing else of the kind, so
that the same code runs live, in the simulated cluster and in the planner.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """Monotonic time in seconds. Timers are the event loop's, which a simulation replaces."""

    def now(self) -> float: ...


class Rng(Protocol):
    """Where ids and seeds come from."""

    def new_id(self) -> str:
        """128 bits as 32 hexadecimal digits."""

    def new_seed(self) -> int:
        """A seed for sampling, 0 <= seed < 2**63."""


class Disk(Protocol):
    """Memory shared by the processes of one host, by name."""

    def create_arena(self, path: str, num_bytes: int) -> memoryview:
        """Reserve and map a new arena in the place of what a dead process left there. Raises
        NoRoomError when there is no room for it, ArenaError when its owner is alive."""

    def open_arena(self, path: str, num_bytes: int = 0) -> memoryview | None:
        """Take over and map what a dead process left there; None if there is nothing, or not of
        this size. Raises ArenaError when its owner is alive."""

    def sweep_arenas(self, folder: str, *, keep_journaled: bool = False) -> list[str]:
        """Remove the arenas in `folder` whose owners are dead, unless they can be taken over and
        are to be kept; returns their paths."""

    def reserve(self, num_bytes: int) -> memoryview:
        """Private memory, taken page by page as it is touched."""

    def map_into(self, memory: memoryview, offset: int, path: str, most_bytes: int) -> None:
        """Replace a part of what `reserve` gave by the first `most_bytes` of an arena, or all of
        it. Raises ArenaError if it cannot be mapped."""

    def remove_arena(self, path: str) -> None:
        """Remove the name. Mappings stay valid. Removing what is not there is no error."""


class Processes(Protocol):
    """The life of other processes on this host."""

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once the process has ended, soon if it has already; returns a way to stop
        watching. A process that cannot be watched counts as running."""

    def started_at(self, pid: int) -> int:
        """When the process began, by the system's count: another one of the same number began at
        another time. 0 if it cannot be told."""


class Files(Protocol):
    """Files on a disk that may be slow, full, torn or lying.

    All but `run` and `close` block: they are called by the work given to `run`, and raise OSError.
    """

    async def run(self, work: Callable[[], T]) -> T:
        """Do the work off the event loop; one piece of work at a time, in order.

        Returns or raises only once the work has ended or is sure never to begin, also when
        cancelled: the work uses memory of the caller.
        """

    def lock_folder(self, folder: str) -> None:
        """Make a folder for this user alone, and keep it locked until `close`. Raises StartError if
        others may enter it, or another process has locked it."""

    def list_folder(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files in it, by name."""

    def read(self, path: str, offset: int, parts: Sequence[memoryview]) -> int:
        """Fill the parts from there on; returns the number of bytes before the end of the file."""

    def write(self, path: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Write the parts from there on; makes the file. Returns when the operating system has
        them: a loss of power may take them away. After an error a part of them may be there."""

    def save(self, path: str, content: bytes) -> None:
        """Replace a small file as a whole; returns when it is on the disk."""

    def remove(self, path: str) -> None:
        """Remove a file. Removing what is not there is no error."""

    def close(self) -> None:
        """Wait for the work that has begun, and unlock the folders."""


class LiveClock:
    """time.monotonic: uvloop's own time has a resolution of a millisecond only."""

    def now(self) -> float:
        return time.monotonic()


class LiveRng:
    """The operating system's randomness."""

    def new_id(self) -> str:
        return secrets.token_hex(16)

    def new_seed(self) -> int:
        return secrets.randbits(63)


class LiveProcesses:
    """pidfds: they stay with the process they were opened for, whoever gets its number later."""

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return loop.call_soon(callback).cancel
        except OSError:  # no permission, or a kernel before 5.3
            return lambda: None
        closed = False

        def stop() -> None:
            nonlocal closed
            if not closed:
                closed = True
                loop.remove_reader(descriptor)
                os.close(descriptor)

        def ended() -> None:
            stop()
            callback()

        loop.add_reader(descriptor, ended)
        return stop

    def started_at(self, pid: int) -> int:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return 0
        return int(stat.rpartition(")")[2].split()[19])
