"""The seams of a simulated world: one thread, virtual time, seeded chance, no real processes."""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from common.kv.arena import ArenaError, LiveDisk, NoArenaError
from common.service import Seams
from kvbaton.sockets import HIGH_WATER_MARK
from tests.sim.files import SimDrive, SimFiles
from tests.sim.loop import PROCESS
from tests.sim.network import SimNetwork, SimTransport
from tests.sim.nixl import SimNixl

T = TypeVar("T")


class SimClock:
    def now(self) -> float:
        return asyncio.get_running_loop().time()


class SimRng:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def new_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def new_seed(self) -> int:
        return self._random.getrandbits(63)


class SimDisk(LiveDisk):
    """Arenas without names in any file system. What a process leaves when it is killed stays."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._owners: dict[str, int] = {}  # process numbers; none for what was left

    def end(self, pid: int) -> None:
        """The process was killed: others may take over what it owned, and it touches it no more."""
        self._owners = {path: owner for path, owner in self._owners.items() if owner != pid}

    def remove_arena(self, path: str) -> None:
        if self._owners.pop(path, None) is not None:
            os.close(self._files.pop(path))

    def sweep_arenas(self, folder: str, *, keep_journaled: bool = False) -> list[str]:
        return []

    def _create(self, path: str) -> int:
        left = self._take(path)
        if left is not None:
            os.close(left)
            self.remove_arena(path)
        self._files[path] = os.memfd_create("arena")
        self._owners[path] = PROCESS.get()
        return os.dup(self._files[path])

    def _take(self, path: str) -> int | None:
        if path in self._owners:
            raise ArenaError(f"{path} is in use")
        if path not in self._files:
            return None
        self._owners[path] = PROCESS.get()
        return os.dup(self._files[path])

    def _open(self, path: str) -> int:
        if path not in self._files:
            raise NoArenaError(f"no arena {path}")
        return os.dup(self._files[path])


class SimProcesses:
    """Processes are numbers; `end` is what SIGKILL would do to one."""

    def __init__(self) -> None:
        self._callbacks: dict[int, list[_OnExit]] = defaultdict(list)
        self._ended: set[int] = set()

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        watch = _OnExit(callback, copy_context())
        if pid in self._ended:
            return asyncio.get_running_loop().call_soon(callback).cancel
        callbacks = self._callbacks[pid]
        callbacks.append(watch)
        return lambda: callbacks.remove(watch) if watch in callbacks else None

    def started_at(self, pid: int) -> int:
        return 1  # no number is used twice

    def end(self, pid: int) -> None:
        """Tell all who watch it; one that is stopped itself hears of it when it goes on."""
        self._ended.add(pid)
        for watch in self._callbacks.pop(pid, []):
            asyncio.get_running_loop().call_soon(watch.callback, context=watch.context)


@dataclass(frozen=True, slots=True, eq=False)
class _OnExit:
    callback: Callable[[], None]
    context: Context


class World:
    """One seed's world. Each process gets its seams from it, and runs in its own context."""

    def __init__(self, seed: int, high_water_mark: int = HIGH_WATER_MARK) -> None:
        self.network = SimNetwork(seed, high_water_mark)
        self.disk = SimDisk()
        self.processes = SimProcesses()
        self.random = random.Random(seed + 1)
        self.drive = SimDrive(seed + 3)
        self.nixl = SimNixl()
        self._files: dict[int, SimFiles] = {}
        self._rng = SimRng(seed + 2)
        self._num_processes = 0

    def seams(self, host_id: str = "host", name: str = "") -> Seams:
        """A new process. Processes of one host see each other end."""
        self._num_processes += 1
        pid = self._num_processes
        self.network.names[pid] = name or str(pid)
        files = self._files[pid] = SimFiles(self.drive)
        return Seams(
            transport=SimTransport(self.network, pid),
            clock=SimClock(),
            rng=self._rng,
            disk=self.disk,
            files=files,
            processes=self.processes,
            host_id=host_id,
            pid=pid,
            aside=_at_once,
            nixl=self.nixl.agent,
        )

    def end(self, pid: int) -> None:
        """What the system does when a process has ended."""
        self._files[pid].close()
        self.processes.end(pid)

    def context(self, pid: int) -> Context:
        """What runs in it is the process's, and stops with it."""
        context = copy_context()
        context.run(PROCESS.set, pid)
        return context


async def _at_once(work: Callable[..., T], *given: Any) -> T:
    """A thread beside the loop is as fast as virtual time allows; others run before it is done."""
    await asyncio.sleep(0)
    return work(*given)
