"""What the supervisor hears, on a real AF_UNIX socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from common.engine.mock import MOCK_LAYOUT
from common.engine.work import DeviceMemory, ModelInfo, Sampled, Work
from common.messages import WorkerCounts
from common.notify import Notifier
from common.seams import LiveClock
from common.worker.endings import Endings
from common.worker.sequence import Sequence
from common.worker.step_fit import StepFits
from common.worker.steps import StepLoop
from kvbaton.sampling import SamplingParams
from tests.supervisor import Supervisor
from tests.unit.sequences import sequence_of


@pytest.fixture(params=["file", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Supervisor]:
    is_file = request.param == "file"
    name = str(tmp_path / "notify") if is_file else f"@kvbaton-test-{os.getpid()}-{id(request)}"
    supervisor = Supervisor(name)
    yield supervisor
    supervisor.close()


@pytest.fixture
def watched(supervisor: Supervisor) -> Iterator[Notifier]:
    """A notifier that is to give a sign of life every 10 ms."""
    notifier = Notifier(supervisor.address, 0.01)
    yield notifier
    notifier.close()


def environ_of(supervisor: Supervisor, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": supervisor.address} | more


def test_a_life_is_told_in_order(supervisor: Supervisor) -> None:
    environ = environ_of(supervisor, HOME="/")
    notifier = Notifier.from_environ(environ, 5)
    assert environ == {"HOME": "/"}, "children must not speak for us"
    notifier.status("loading\nthe model " + "x" * 300)
    notifier.ready("serving")
    notifier.stopping("draining")
    notifier.close()
    notifier.status("too late")
    assert supervisor.listen() == [
        f"STATUS=loading the model {'x' * 182}",
        "READY=1",
        "STATUS=serving",
        "STOPPING=1",
        "STATUS=draining",
    ]


@pytest.mark.parametrize(
    ("variables", "beat_every_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 7.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "5"}, 7.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "6"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_is_for_the_process_it_names(
    supervisor: Supervisor, variables: dict[str, str], beat_every_s: float
) -> None:
    notifier = Notifier.from_environ(environ_of(supervisor, **variables), 5)
    assert notifier.beat_every_s == beat_every_s
    notifier.beat()
    notifier.close()
    assert supervisor.listen() == (["WATCHDOG=1"] if beat_every_s else [])


def test_without_a_supervisor_nothing_is_said() -> None:
    notifier = Notifier.from_environ({"WATCHDOG_USEC": "1000"}, 5)
    notifier.ready("serving")
    notifier.beat()
    assert notifier.beat_every_s == 0


def test_a_socket_of_another_kind_is_told_and_left_alone() -> None:
    with capture_logs() as logs:
        notifier = Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:1234"}, 5)
        notifier.ready("serving")
    assert [each["event"] for each in logs] == ["supervisor_not_told"]


def test_a_supervisor_that_is_gone_or_reads_nothing_stops_nobody(supervisor: Supervisor) -> None:
    notifier = Notifier(supervisor.address, 1e-9)
    supervisor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    with capture_logs() as logs:
        for _ in range(1000):
            notifier.beat()
        supervisor.socket.close()
        notifier.status("alone")
    notifier.close()
    reasons = {each["reason"] for each in logs}
    assert "Connection refused" in reasons
    assert "Resource temporarily unavailable" in reasons


def test_beats_are_few_however_often_there_is_a_turn(supervisor: Supervisor) -> None:
    notifier = Notifier(supervisor.address, 3600)
    notifier.describe = lambda: "serving: 3"
    notifier.ready("ready")
    for _ in range(100):
        notifier.beat()
    notifier.close()
    assert supervisor.listen()[2:] == ["WATCHDOG=1", "STATUS=serving: 3"]


async def test_a_service_beats_while_its_event_loop_turns(
    supervisor: Supervisor, watched: Notifier
) -> None:
    beating = asyncio.ensure_future(watched.beat_on())
    for _ in range(3):
        await supervisor.wait_for_async("WATCHDOG=1")
    beating.cancel()
    await asyncio.wait([beating])


# ---- the engine's loop --------------------------------------------------------------------------


class Engine:
    """Implements work.Engine; a step lasts until `may_end` is set."""

    info = ModelInfo("x", 16, 16, (), MOCK_LAYOUT)
    device_memory: DeviceMemory | None = None
    full_step_tokens = 1
    arithmetic_s = 0.0

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

    def attach(self, arena: memoryview) -> None:
        pass

    async def prepare(self, sampling: SamplingParams) -> None:
        pass

    async def step(self, works: object) -> list[Sampled | None]:
        self.has_begun.set()
        await self.may_end.wait()
        return [None]

    def close(self) -> None:
        pass


class Planner:
    """One step, once there is to be one. Stands for the endings as well."""

    def __init__(self) -> None:
        work = Work([1], 1, 0, 1, [0], SamplingParams(), sample=False)
        self.plan = [(sequence_of(1), work)]
        self.is_busy = False

    def plan_step(self) -> list[tuple[Sequence, Work]]:
        plan = self.plan if self.is_busy else []
        self.is_busy = False
        return plan

    def advance(self, sequence: Sequence, work: Work, sampled: Sampled | None) -> None:
        pass

    def step_ended(self) -> None:
        pass

    def hold(self, sequence: Sequence) -> None:
        pass

    def release(self, sequence: Sequence) -> None:
        pass


async def test_an_idle_engine_lives_and_one_whose_step_hangs_does_not(
    supervisor: Supervisor, watched: Notifier
) -> None:
    engine, planner = Engine(), Planner()
    steps = StepLoop(
        engine,
        planner,
        cast("Endings", planner),
        LiveClock(),
        watched,
        fits=StepFits(16),
        counts=WorkerCounts(),
    )
    running = asyncio.ensure_future(steps.run())
    for _ in range(3):
        await supervisor.wait_for_async("WATCHDOG=1")
    planner.is_busy = True
    steps.wake.set()
    await engine.has_begun.wait()
    supervisor.listen()
    await asyncio.sleep(20 * watched.beat_every_s)
    assert supervisor.listen() == [], "the step hangs, and somebody said that all is well"
    engine.may_end.set()
    await supervisor.wait_for_async("WATCHDOG=1")
    running.cancel()
    await asyncio.wait([running])
