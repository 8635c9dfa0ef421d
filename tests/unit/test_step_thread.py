"""The thread that steps run on."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from common.engine.step_thread import StepThread


async def test_it_prepares_once_and_computes_on_one_thread_of_its_own() -> None:
    prepared: list[str] = []
    thread = StepThread("steps", lambda: prepared.append(threading.current_thread().name))
    names = [await thread.run(lambda _: threading.current_thread().name, None) for _ in range(3)]
    thread.close()
    assert names == ["steps"] * 3
    assert prepared == ["steps"]


async def test_what_is_raised_there_is_raised_here_and_the_next_one_runs() -> None:
    thread = StepThread("steps", lambda: None)
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda number: 1 // number, 0)
    assert await thread.run(lambda number: 1 // number, 1) == 1
    thread.close()


async def test_the_loop_goes_on_while_it_computes() -> None:
    thread = StepThread("steps", lambda: None)
    going = threading.Event()
    work = asyncio.ensure_future(thread.run(going.wait, 20))
    await asyncio.sleep(0)
    going.set()
    assert await work
    thread.close()


async def test_one_that_nobody_waits_for_is_left_out_or_ends_unseen() -> None:
    thread = StepThread("steps", lambda: None)
    begun, may_end = threading.Event(), threading.Event()
    ran: list[str] = []

    def work(name: str) -> None:
        ran.append(name)
        begun.set()
        assert may_end.wait(20)

    running = asyncio.ensure_future(thread.run(work, "running"))
    assert await asyncio.to_thread(begun.wait, 20)
    waiting = asyncio.ensure_future(thread.run(work, "waiting"))
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    may_end.set()
    await thread.run(work, "next")
    thread.close()
    assert ran == ["running", "next"]


def test_close_waits_and_a_loop_that_has_gone_is_not_told() -> None:
    thread = StepThread("steps", lambda: None)
    may_end = threading.Event()
    ended: list[bool] = []

    async def leave() -> None:
        work = asyncio.ensure_future(thread.run(lambda _: ended.append(may_end.wait(20)), None))
        await asyncio.sleep(0.01)
        work.cancel()

    asyncio.run(leave())
    may_end.set()
    thread.close()
    assert ended == [True]


async def test_one_that_cannot_begin_or_has_ended_says_so() -> None:
    def fail() -> None:
        raise OSError("no such thread count")

    thread = StepThread("steps", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no such thread count"):
            await thread.run(lambda _: None, None)
    thread.close()
    with pytest.raises(RuntimeError, match="the thread has ended"):
        await thread.run(lambda _: None, None)


async def test_it_keeps_nothing_of_what_is_done() -> None:
    class Given:
        pass

    thread = StepThread("steps", lambda: None)
    given = Given()
    seen = weakref.ref(given)
    await thread.run(lambda each: each, given)
    del given
    await thread.run(lambda _: None, None)
    gc.collect()
    assert seen() is None
    thread.close()
