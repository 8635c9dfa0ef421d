"""An event loop on virtual time, in which a process can be stopped and go on, as by signals.

Everything a process does runs as callbacks, and each carries the context it was made in: `PROCESS`
tells whose it is. A stopped process's callbacks and timers are kept until it goes on.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

PROCESS: ContextVar[int] = ContextVar("process", default=0)  # 0: nobody's, the test's own


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
    """Stops processes between two callbacks: none is cut in the middle."""

    _ready: Any  # asyncio's own deque of handles and heap of timers
    _scheduled: Any

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        self._stopped: dict[int, list[asyncio.Handle]] = {}
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now

    def is_stopped(self, pid: int) -> bool:
        return pid in self._stopped

    def stop_process(self, pid: int) -> None:
        """As SIGSTOP."""
        assert pid not in self._stopped
        mine = [handle for handle in self._ready if _process_of(handle) == pid]
        others = [handle for handle in self._ready if _process_of(handle) != pid]
        self._ready.clear()
        self._ready.extend(others)
        timers = [
            timer
            for timer in self._scheduled
            if _process_of(timer) == pid and not timer.cancelled()
        ]
        self._stopped[pid] = [*mine, *timers]
        kept = set(timers)
        self._scheduled = [timer for timer in self._scheduled if timer not in kept]
        heapq.heapify(self._scheduled)
        for timer in timers:
            timer._scheduled = False

    def continue_process(self, pid: int) -> int:
        """As SIGCONT. Returns how many of its timers were late."""
        handles = [handle for handle in self._stopped.pop(pid) if not handle.cancelled()]
        timers = [handle for handle in handles if isinstance(handle, asyncio.TimerHandle)]
        self._ready.extend(handle for handle in handles if handle not in timers)
        late = [timer for timer in timers if timer.when() <= self.time()]
        for timer in sorted(timers, key=asyncio.TimerHandle.when):
            timer._scheduled = True  # type: ignore[attr-defined]
            heapq.heappush(self._scheduled, timer)
        return len(late)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = super().call_soon(callback, *args, context=context)
        if self._stopped:
            kept = self._stopped.get(_process_of(handle))
            if kept is not None:
                self._ready.pop()
                kept.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        if self._stopped:
            kept = self._stopped.get(_process_of(timer))
            if kept is not None:
                self._scheduled.remove(timer)
                heapq.heapify(self._scheduled)
                timer._scheduled = False  # type: ignore[attr-defined]
                kept.append(timer)
        return timer


def virtual_loop() -> VirtualLoop:
    """The running loop, which must be one on virtual time."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def _process_of(handle: asyncio.Handle) -> int:
    return handle._context.get(PROCESS, 0)  # type: ignore[attr-defined,no-any-return]
