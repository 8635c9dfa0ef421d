"""The thread that steps run on: one job at a time, there and back in the fewest operations.

A ThreadPoolExecutor would do. But each step goes there and back, on caches that the model has just
emptied, and half of what that took was its futures' locks and callbacks (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_Job = tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[..., Any], Any]


class StepThread:
    """A thread that begins with `prepare` and then runs what it is given, in order."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._prepare = prepare
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[Any], T], given: object) -> T:
        """work(given) there; what it raises is raised here. One that nobody waits for any more is
        left out, unless it has begun. Raises RuntimeError once it is closed."""
        if self._is_closed:
            raise RuntimeError("the thread has ended")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._jobs.put((loop, done, work, given))
        return await done

    def close(self) -> None:
        """Wait for what it was given to end."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        broken: BaseException | None = None
        try:
            self._prepare()
        except BaseException as raised:
            broken = raised  # every job is told
        while (job := self._jobs.get()) is not None:
            loop, done, work, given = job
            result, error = None, broken
            try:
                if broken is None and not done.cancelled():
                    result = work(given)
            except BaseException as raised:  # whatever it is, somebody waits to hear of it
                error = raised
            with suppress(RuntimeError):  # the loop has been closed: nobody waits
                loop.call_soon_threadsafe(_settle, done, result, error)
            del job, done, given, result, error  # not kept until the next one comes


def _settle(done: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
