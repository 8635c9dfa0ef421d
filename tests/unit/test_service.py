"""The life of a service: each failure is seen, and the exit status tells how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import StartError
from common.notify import Notifier
from common.service import EXIT_MISCONFIGURED, Tasks, run_service
from tests.supervisor import Supervisor

ROOT = Path(__file__).parents[2]


# ---- tasks --------------------------------------------------------------------------------------


async def test_a_failed_task_is_told_with_its_error() -> None:
    failures: list[BaseException] = []
    tasks = Tasks(failures.append)

    async def fail() -> None:
        raise ValueError("broken")

    task = tasks.spawn(fail(), "failing")
    assert task.get_name() == "failing"
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert [str(error) for error in failures] == ["broken"]


async def test_a_task_that_ends_or_is_cancelled_is_no_failure() -> None:
    failures: list[BaseException] = []
    tasks = Tasks(failures.append)
    done = tasks.spawn(asyncio.sleep(0), "done")
    cancelled = tasks.spawn(asyncio.sleep(60), "cancelled")
    cancelled.cancel()
    await asyncio.wait({done, cancelled})
    await asyncio.sleep(0)
    assert failures == []


async def test_close_waits_until_every_task_has_cleaned_up() -> None:
    tasks, cleaned = Tasks(lambda _error: None), []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(name)

    for name in "ab":
        tasks.spawn(work(name), name)
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(cleaned) == ["a", "b"]


async def test_close_ends_tasks_that_are_spawned_while_it_waits() -> None:
    tasks = Tasks(lambda _error: None)
    spawned: list[asyncio.Task[object]] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            spawned.append(tasks.spawn(asyncio.sleep(60), "late"))

    tasks.spawn(work(), "first")
    await asyncio.sleep(0)
    await tasks.close()
    assert [task.cancelled() for task in spawned] == [True]


async def test_a_task_may_close_its_own_service() -> None:
    tasks = Tasks(lambda _error: None)
    other = tasks.spawn(asyncio.sleep(60), "other")
    await tasks.spawn(tasks.close(), "closing")
    assert other.cancelled()


# ---- the exit status ----------------------------------------------------------------------------


class FakeService:
    """Does at each point of its life what a test wants, and remembers the order."""

    def __init__(self, on_start: Callable[[FakeService], object] = lambda _service: None) -> None:
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.life: list[str] = []
        self._on_start = on_start

    async def start(self) -> None:
        self.life.append("start")
        result = self._on_start(self)
        if asyncio.iscoroutine(result):
            await result
        self.life.append("ready")

    async def drain(self) -> None:
        self.life.append("drain")

    async def close(self) -> None:
        self.life.append("close")


def raise_soon(signum: int) -> Callable[[FakeService], object]:
    return lambda _service: asyncio.get_running_loop().call_soon(signal.raise_signal, signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_well(signum: int) -> None:
    service = FakeService(raise_soon(signum))
    assert await run_service(service) == 0
    assert service.life == ["start", "ready", "drain", "close"]


async def test_a_service_that_failed_is_closed_without_drain() -> None:
    service = FakeService(lambda service: service.failed.set_result(ValueError("lost")))
    assert await run_service(service) == 1
    assert service.life == ["start", "ready", "close"]


async def test_a_signal_during_the_start_ends_it() -> None:
    async def never(service: FakeService) -> None:
        raise_soon(signal.SIGTERM)(service)
        await asyncio.sleep(60)

    service = FakeService(never)
    assert await run_service(service) == 0
    assert service.life == ["start", "close"]


async def test_a_failed_start_is_raised_after_close() -> None:
    def refuse(_service: FakeService) -> None:
        raise StartError("no room")

    service = FakeService(refuse)
    with pytest.raises(StartError, match="no room"):
        await run_service(service)
    assert service.life == ["start", "close"]


async def test_a_drain_that_takes_too_long_is_cut_off() -> None:
    class Slow(FakeService):
        async def drain(self) -> None:
            await asyncio.sleep(60)

    service = Slow(raise_soon(signal.SIGTERM))
    assert await run_service(service, drain_s=0.01) == 0
    assert service.life == ["start", "ready", "close"]


# ---- what the supervisor hears ------------------------------------------------------------------


class Narrator(FakeService):
    """Tells the supervisor itself, too, where it is."""

    def __init__(self, notifier: Notifier, on_start: Callable[[FakeService], object]) -> None:
        super().__init__(on_start)
        self._notifier = notifier

    async def start(self) -> None:
        self._notifier.status("loading")
        await super().start()

    async def drain(self) -> None:
        self._notifier.status("handing on")
        await super().drain()


async def heard(tmp_path: Path, on_start: Callable[[FakeService], object]) -> list[str]:
    supervisor = Supervisor(str(tmp_path / "notify"))
    notifier = Notifier(supervisor.address)
    with contextlib.suppress(StartError):
        await run_service(Narrator(notifier, on_start), notifier)
    lines = supervisor.listen()
    notifier.close()
    supervisor.close()
    return lines


async def test_ready_comes_after_the_start_and_stopping_before_the_drain(tmp_path: Path) -> None:
    assert await heard(tmp_path, raise_soon(signal.SIGTERM)) == [
        "STATUS=loading",
        "READY=1",
        "STATUS=ready",
        "STOPPING=1",
        "STATUS=draining, for 3.5 s at most",
        "STATUS=handing on",
    ]


async def test_a_failure_is_told(tmp_path: Path) -> None:
    lines = await heard(tmp_path, lambda service: service.failed.set_result(ValueError("lost")))
    assert lines[-1] == "STATUS=failed: lost"


async def test_what_does_not_start_is_never_ready(tmp_path: Path) -> None:
    def refuse(_service: FakeService) -> None:
        raise StartError("no room")

    assert await heard(tmp_path, refuse) == ["STATUS=loading"]


# ---- a process ----------------------------------------------------------------------------------

PROCESS = """
import asyncio, sys
from common.config import StartError
from common.net.access import Access
from common.service import serve

class Service:
    def __init__(self, seams):
        self.failed = asyncio.get_running_loop().create_future()
    async def start(self):
        if sys.argv[1] == "refuse":
            raise StartError("--kv-bytes must be larger")
        if sys.argv[1] == "fail":
            self.failed.set_result(ValueError("lost"))
        print("ready", flush=True)
    async def drain(self):
        print("draining", flush=True)
        if sys.argv[1] == "hang":
            await asyncio.sleep(60)
    async def close(self):
        print("closed", flush=True)

access = Access("decode", "", insecure=True, binds=[])
sys.exit(asyncio.run(serve("test", "error", access, Service)))
"""


def run(kind: str, num_signals: int, notify_socket: str = "") -> tuple[int, str, str]:
    """Exit status, what the service printed, and the log; a signal follows each line it prints."""
    popen = subprocess.Popen(
        [sys.executable, "-c", PROCESS, kind],
        cwd=ROOT,
        env=os.environ | {"NOTIFY_SOCKET": notify_socket},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None
    heard = ""
    for _ in range(num_signals):
        heard += popen.stdout.readline()
        os.kill(popen.pid, signal.SIGTERM)
    rest, words = popen.communicate(timeout=30)
    return popen.returncode, heard + rest, words


@pytest.mark.parametrize(
    ("kind", "num_signals", "status", "printed"),
    [
        ("serve", 1, 0, "ready draining closed"),
        ("fail", 0, 1, "ready closed"),
        ("refuse", 0, EXIT_MISCONFIGURED, "closed"),
        ("hang", 2, 1, "ready draining"),
    ],
)
def test_the_exit_status_tells_how_a_process_ended(
    kind: str, num_signals: int, status: int, printed: str
) -> None:
    returncode, heard, words = run(kind, num_signals)
    assert (returncode, heard.split()) == (status, printed.split()), words
    assert ("--kv-bytes must be larger" in words) == (kind == "refuse")


@pytest.mark.parametrize(
    ("kind", "num_signals", "told"),
    [
        (
            "serve",
            1,
            ["READY=1", "STATUS=ready", "STOPPING=1", "STATUS=draining, for 3.5 s at most"],
        ),
        (
            "hang",
            2,
            ["READY=1", "STATUS=ready", "STOPPING=1", "STATUS=draining, for 3.5 s at most"],
        ),
        ("refuse", 0, ["STATUS=cannot start: --kv-bytes must be larger"]),
    ],
)
def test_a_supervisor_hears_how_it_is(
    tmp_path: Path, kind: str, num_signals: int, told: list[str]
) -> None:
    """What runs when a second signal comes ends at once, in the middle of its drain."""
    supervisor = Supervisor(str(tmp_path / "notify"))
    run(kind, num_signals, supervisor.address)
    assert supervisor.listen() == told
    supervisor.close()
