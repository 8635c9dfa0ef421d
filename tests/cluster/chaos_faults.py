"""Faults that befall a process, each proven to have happened: see chaos.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.cluster import proc
from tests.cluster.processes import Cluster, metrics
from tests.ports import free_port

HEARTBEAT_S, LOST_AFTER_S = 0.2, 1.0
READY_S = 60.0
POLL_S = 0.05
ROLES = ("prefill", "decode", "kvstore", "gateway")
COUNTS = {"kvstore": 1, "prefill": 2, "decode": 2, "gateway": 2}


class Chaotic:
    """A cluster whose processes can be started again as they were."""

    def __init__(self, cluster: Cluster, worker: dict[str, Any], gateway: dict[str, Any]) -> None:
        self.cluster = cluster
        self._settings: dict[str, dict[str, Any]] = {
            "kvstore": {
                "kv_bytes": "64M",
                "heartbeat_s": HEARTBEAT_S,
                "lost_after_s": LOST_AFTER_S,
            },
            "prefill": worker,
            "decode": worker,
            "gateway": gateway,
        }
        self._addresses = {
            f"gateway.{number}": {
                "bind": f"tcp://127.0.0.1:{free_port()}",
                "http_port": free_port(),
            }
            for number in range(1, COUNTS["gateway"] + 1)
        }

    @property
    def endpoints(self) -> list[str]:
        """Where msgpack clients reach each gateway."""
        return [str(each["bind"]) for each in self._addresses.values()]

    @property
    def base_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{each['http_port']}" for each in self._addresses.values()]

    def start_all(self) -> None:
        for role, count in COUNTS.items():
            for number in range(1, count + 1):
                self.start(f"{role}.{number}")

    def start(self, name: str) -> None:
        role, _, number = name.partition(".")
        self.cluster.start(
            role, int(number), **self._settings[role] | self._addresses.get(name, {})
        )

    def pid(self, name: str) -> int:
        return self.cluster.processes[name].pid

    async def ready(self) -> None:
        """Until every gateway knows every worker. Raises AssertionError, with the logs."""
        wanted = COUNTS["prefill"] + COUNTS["decode"]
        deadline = time.monotonic() + READY_S
        async with httpx.AsyncClient(timeout=5) as http:
            for base_url in self.base_urls:
                while await _num_workers(http, base_url) != wanted:
                    dead = [n for n, p in self.cluster.processes.items() if p.poll() is not None]
                    assert not dead, f"{dead} ended by themselves\n{self.cluster.logs()}"
                    assert time.monotonic() < deadline, f"not ready\n{self.cluster.logs()}"
                    await asyncio.sleep(POLL_S)


async def _num_workers(http: httpx.AsyncClient, base_url: str) -> float:
    try:
        stats = metrics((await http.get(f"{base_url}/metrics")).text)
    except httpx.TransportError:
        return -1
    return sum(stats[f"kvbaton_gateway_{role}_workers"] for role in ("prefill", "decode"))


async def kill(chaotic: Chaotic, name: str) -> None:
    """SIGKILL, and another process in its place."""
    former = chaotic.pid(name)
    chaotic.cluster.kill(name)  # asserts exit status -9
    chaotic.start(name)
    assert chaotic.pid(name) != former


async def pause(chaotic: Chaotic, name: str) -> None:
    """SIGSTOP for longer than its lease, then SIGCONT."""
    pid = chaotic.pid(name)
    os.kill(pid, signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert proc.state(pid) == "T"
    await asyncio.sleep(LOST_AFTER_S + 2 * HEARTBEAT_S)
    assert proc.state(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WCONTINUED | os.WNOWAIT)
    assert proc.state(pid) != "T"


async def drain(chaotic: Chaotic, name: str) -> None:
    """SIGTERM: it ends in order, with status 0, and another comes in its place."""
    status = await asyncio.to_thread(chaotic.cluster.terminate, name)
    assert status == 0, f"{name} ended with status {status}\n{chaotic.cluster.logs()}"
    chaotic.start(name)


@dataclass(frozen=True)
class Kind:
    """What is done to which role."""

    role: str
    deed: str

    def __str__(self) -> str:
        return f"{self.role}-{self.deed}"


DEEDS: dict[str, Callable[[Chaotic, str], Awaitable[None]]] = {
    "kill": kill,
    "pause": pause,
    "drain": drain,
}
KINDS = {str(kind): kind for role in ROLES for deed in DEEDS if (kind := Kind(role, deed))}
