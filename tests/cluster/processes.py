"""Clusters of real processes on free ports, for tests. What is started here is ended here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import httpx

from kvbaton import Client
from scripts.cluster.keys import make_keys
from tests.ports import free_port, free_ports

ROOT = Path(__file__).parents[2]
_START_S = 60.0
_STOP_S = 5.0


class Cluster:
    """Services of one cluster. Settings are given to every service that knows them.

    They use keys, which clients find by KVBATON_KEYS while the context lasts; with `secure` False
    they use none. Leaving the context stops all with SIGTERM, and fails if one had crashed, does
    not stop in time or leaves an arena behind.
    """

    def __init__(self, folder: Path, num_stores: int = 1, *, secure: bool = True) -> None:
        self.folder = folder
        self.keys = folder / "keys" if secure else None
        if self.keys is not None:
            make_keys(self.keys)
        self._environ = patch.dict(os.environ, {"KVBATON_KEYS": str(self.keys or "")})
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.http_port, self.client_port, *store_ports = free_ports(2 + 2 * num_stores)
        self.stores = ",".join(f"tcp://127.0.0.1:{port}" for port in store_ports[::2])
        self._store_ports = list(zip(store_ports[::2], store_ports[1::2], strict=True))
        self.arena_dir = Path(tempfile.mkdtemp(prefix="kvbaton-test-", dir="/dev/shm"))
        self._killed: set[str] = set()
        self.base_url = f"http://127.0.0.1:{self.http_port}"

    def client(self, **options: Any) -> Client:
        """A msgpack client of the gateway."""
        return Client(f"tcp://127.0.0.1:{self.client_port}", keys=self.keys or "", **options)

    def start(self, role: str, number: int = 1, **settings: Any) -> None:
        """Start one service. Settings are flags, with underscores for dashes."""
        name = f"{role}.{number}"
        command = [sys.executable, "-m", f"services.{role}", "--name", name]
        for flag, value in (self._flags(role, number) | settings).items():
            command += [f"--{flag.replace('_', '-')}", str(value)]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = self._popen(name, command, stdout=log, stderr=log)

    def _popen(self, name: str, command: list[str], **outputs: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, **outputs)

    def _flags(self, role: str, number: int) -> dict[str, Any]:
        """Keys and addresses."""
        flags: dict[str, Any] = {"keys": self.keys} if self.keys else {"insecure": True}
        if role == "kvstore":
            control, data = self._store_ports[number - 1]
            flags["bind"] = f"tcp://127.0.0.1:{control}"
            flags["data_bind"] = f"tcp://127.0.0.1:{data}"
            flags["arena_dir"] = self.arena_dir
        else:
            flags["stores"] = self.stores
        if role == "gateway":
            flags["http_port"] = self.http_port
            client_port = self.client_port if number == 1 else free_port()
            flags["bind"] = f"tcp://127.0.0.1:{client_port}"
        return flags

    def wait_ready(self, num_workers: int) -> None:
        """Until the gateway serves and knows so many workers."""
        deadline = time.monotonic() + _START_S
        with httpx.Client(base_url=self.base_url) as http:
            while time.monotonic() < deadline:
                self._check_alive()
                try:
                    stats = metrics(http.get("/metrics").text)
                    workers = ("prefill_workers", "decode_workers")
                    if sum(stats[f"kvbaton_gateway_{name}"] for name in workers) == num_workers:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise AssertionError(f"not ready after {_START_S} s\n{self.logs()}")

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-2000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def kill(self, name: str) -> None:
        """SIGKILL, and see it dead."""
        self._killed.add(name)
        process = self.processes.pop(name)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    def terminate(self, name: str) -> int:
        """SIGTERM; the exit status."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(_STOP_S)

    def _check_alive(self) -> None:
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        assert not dead, f"{dead} ended by themselves\n{self.logs()}"

    def __enter__(self) -> Self:
        self._environ.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._environ.stop()
        ended = {name: process.poll() for name, process in self.processes.items()}
        for process in self.processes.values():
            process.terminate()
        statuses = {}
        for name, process in self.processes.items():
            try:
                statuses[name] = process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        left = list(self.arena_dir.iterdir())
        shutil.rmtree(self.arena_dir)
        if kind is None:
            assert not any(status is not None for status in ended.values()), self.logs()
            assert not any(statuses.values()), f"{statuses}\n{self.logs()}"
            assert not left or any(name.startswith("kvstore") for name in self._killed)


def metrics(text: str) -> dict[str, float]:
    """Prometheus' text format without labels."""
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line[:2] for line in lines) if "{" not in name}


@contextmanager
def running(
    folder: Path,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    num_stores: int = 1,
    mode: str = "disaggregated",
    store: dict[str, Any] | None = None,
    worker: dict[str, Any] | None = None,
    gateway: dict[str, Any] | None = None,
    secure: bool = True,
) -> Iterator[Cluster]:
    """A cluster that is ready, with these many processes."""
    with Cluster(folder, num_stores, secure=secure) as cluster:
        for number in range(1, num_stores + 1):
            cluster.start("kvstore", number, **({"kv_bytes": "64M"} | (store or {})))
        for number in range(1, num_prefill + 1):
            cluster.start("prefill", number, **(worker or {}))
        for number in range(1, num_decode + 1):
            cluster.start("decode", number, **(worker or {}))
        cluster.start("gateway", mode=mode, **(gateway or {}))
        cluster.wait_ready(num_prefill + num_decode)
        yield cluster


def cpu_seconds(pids: list[int]) -> float:
    """CPU time that the processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
