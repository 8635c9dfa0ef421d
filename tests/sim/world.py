"""The seams of a simulated world: one thread, virtual time, seeded chance, no real processes."""

from __future__ import annotations

import asyncio
import os
import random
import selectors
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common.kv.arena import ArenaError, LiveDisk
from common.service import Seams
from tests.sim.network import SimNetwork, SimTransport


class NothingLeftError(Exception):
    """Every task waits for something that no timer will bring: a hang."""


class _JumpingSelector(selectors.SelectSelector):
    """Where a live loop would wait, time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise NothingLeftError
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now


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
    """Arenas without names in any file system."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def remove_arena(self, path: str) -> None:
        descriptor = self._files.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def sweep_arenas(self, folder: str) -> list[str]:
        return []

    def _create(self, path: str) -> int:
        self._files[path] = os.memfd_create("arena")
        return os.dup(self._files[path])

    def _open(self, path: str) -> int:
        if path not in self._files:
            raise ArenaError(f"no arena {path}")
        return os.dup(self._files[path])


class SimProcesses:
    """Processes are numbers; `end` is what SIGKILL would do to one."""

    def __init__(self) -> None:
        self._callbacks: dict[int, list[Callable[[], None]]] = defaultdict(list)

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        callbacks = self._callbacks[pid]
        callbacks.append(callback)
        return lambda: callbacks.remove(callback) if callback in callbacks else None

    def end(self, pid: int) -> None:
        for callback in list(self._callbacks.pop(pid, [])):
            callback()


class World:
    """One seed's world. Each process gets its seams from it."""

    def __init__(self, seed: int) -> None:
        self.network = SimNetwork(seed)
        self.disk = SimDisk()
        self.processes = SimProcesses()
        self.random = random.Random(seed + 1)
        self._rng = SimRng(seed + 2)
        self._num_processes = 0

    def seams(self, host_id: str = "host") -> Seams:
        """A new process. Processes of one host see each other end."""
        self._num_processes += 1
        pid = self._num_processes
        return Seams(
            transport=SimTransport(self.network, pid),
            clock=SimClock(),
            rng=self._rng,
            disk=self.disk,
            processes=self.processes,
            host_id=host_id,
            pid=pid,
        )
