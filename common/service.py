"""What every service shares: its seams, its tasks, and its life from start to drained end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog

from common.config import StartError
from common.files import LiveFiles
from common.kv.arena import LiveDisk
from common.log import configure_logging
from common.net.access import Access
from common.net.nixl import Agent, load_agent
from common.net.transport import Transport
from common.net.zmq_transport import ZmqTransport
from common.notify import Notifier
from common.seams import Clock, Disk, Files, LiveClock, LiveProcesses, LiveRng, Processes, Rng

log = structlog.get_logger()

DRAIN_TIMEOUT_S = 3.5  # honcho kills after 5 s
DRAIN_HELP = "time that what is under way may take to end or move elsewhere, after SIGTERM"
EXIT_MISCONFIGURED = os.EX_CONFIG  # starting again would end alike


# Called with a function and what to give it; its result comes when that is done.
Aside = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Seams:
    """Everything a service uses of the world outside it."""

    transport: Transport
    clock: Clock
    rng: Rng
    disk: Disk
    files: Files
    processes: Processes
    host_id: str  # processes with equal ids can share memory
    pid: int
    notifier: Notifier = field(default_factory=Notifier)  # tells who started us how we are
    aside: Aside = asyncio.to_thread  # runs arithmetic beside the event loop
    nixl: Callable[[str, str], Agent] = load_agent  # by name and devices, where settings ask for it


class Tasks:
    """Owned tasks: each failure is seen, and all are cancelled and awaited at the end.

    An unexpected exception is logged and passed to `on_failure`: a service that has lost one of its
    loops must not look alive.
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a coroutine as a task of this service."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error)
            self._on_failure(error)

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        current = asyncio.current_task()
        while waiting := [task for task in self._tasks if task is not current]:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


class Service(Protocol):
    """A process's main object."""

    failed: asyncio.Future[BaseException]

    async def start(self) -> None:
        """Bind, connect, load; returns when the service can work."""

    async def drain(self) -> None:
        """Take no new work, finish or give up what is held."""

    async def close(self) -> None:
        """Release every resource. Called once, also after a failed start."""


async def run_service(
    service: Service, notifier: Notifier | None = None, drain_s: float = DRAIN_TIMEOUT_S
) -> int:
    """Start, serve until SIGTERM, SIGINT or a failure, drain, close. Returns the exit status.

    A second signal ends the process at once, with status 1."""
    notifier = notifier or Notifier()
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()

    def on_signal(name: str) -> None:
        if stop.done():
            log.warning("second_signal", signal=name)
            os._exit(1)
        stop.set_result(name)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal, signum.name)
    try:
        starting = asyncio.ensure_future(service.start())
        await first_of(starting, stop)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        starting.result()
        notifier.ready("ready")
        await first_of(stop, service.failed)
        if service.failed.done():
            log.error("service_failed", reason=str(service.failed.result()))
            notifier.status(f"failed: {service.failed.result()}")
            return 1
        log.info("draining", signal=stop.result(), num_tasks=len(asyncio.all_tasks()))
        notifier.stopping(f"draining, for {drain_s:g} s at most")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await service.drain()
        return 0
    finally:
        await service.close()


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def serve(
    name: str,
    log_level: str,
    access: Access,
    make_service: Callable[[Seams], Service],
    drain_s: float = DRAIN_TIMEOUT_S,
    *,
    io_threads: int = 1,
) -> int:
    """The whole life of a service's process. Returns the exit status."""
    configure_logging(log_level, name)
    notifier = Notifier.from_environ(os.environ, os.getpid())
    try:
        keys = access.load()
        if keys is None:
            log.warning("insecure", reason="no keys: whoever reaches the ports may say anything")
        transport = ZmqTransport(keys, io_threads)
        seams = dataclasses.replace(live_seams(transport), notifier=notifier)
        return await _serve(seams, transport, make_service, drain_s)
    except StartError as error:
        log.error("cannot_start", reason=str(error))
        notifier.status(f"cannot start: {error}")
        return EXIT_MISCONFIGURED
    except Exception as error:
        notifier.status(f"failed: {error!r}")
        raise
    finally:
        notifier.close()


async def _serve(
    seams: Seams,
    transport: ZmqTransport,
    make_service: Callable[[Seams], Service],
    drain_s: float,
) -> int:
    try:
        await transport.prove()
        return await run_service(make_service(seams), seams.notifier, drain_s)
    finally:
        transport.close()
        seams.files.close()


def live_seams(transport: Transport | None = None) -> Seams:
    """The real world; without keys unless `transport` has some.

    A host is named by its boot and its process namespace: containers of one machine share neither
    process ids nor, as a rule, /dev/shm."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host_id = f"{boot_id}/{Path('/proc/self/ns/pid').readlink()}"
    return Seams(
        transport=transport or ZmqTransport(),
        clock=LiveClock(),
        rng=LiveRng(),
        disk=LiveDisk(),
        files=LiveFiles(),
        processes=LiveProcesses(),
        host_id=host_id,
        pid=os.getpid(),
    )
