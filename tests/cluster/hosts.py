"""Hosts made of namespaces: each has a network, processes and a /dev/shm of its own, on one bridge.

They share the disk, the clock and the kernel. Nothing here has a name outside: namespaces end with
the process that holds them, and with them all that runs there, the cables and the addresses. Its
holder ends when its stdin does, so also when we are killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_FS = 0x200  # a thread that shares its folder and root with others cannot change its mounts
_IN_NETWORK = ("net",)
_INSIDE = ("net", "pid_for_children", "mnt")
# Some milliseconds, which timers are no finer than, and more than a segment that is not cut yet.
_BURST_KIB = {"100mbit": 128, "500mbit": 256, "1gbit": 256, "10gbit": 2048}
AS_ROOT = "unshare --map-root-user --mount --net scripts/test tests/cluster/test_hosts.py"


class HostsError(Exception):
    """There can be no hosts here; the message says why."""


@contextmanager
def _namespaces(kinds: Sequence[str], setup: str) -> Iterator[int]:
    """New namespaces in which `setup` has run, and the process whose they are."""
    flags = [f"--{kind}" for kind in kinds]
    command = ["unshare", *flags, "sh", "-euc", f"{setup}; echo ready; exec cat"]
    pipe = subprocess.PIPE
    try:
        holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    except FileNotFoundError as error:
        raise HostsError("unshare (util-linux) is missing") from error
    with holder:  # at the end its stdin is closed, and it is waited for
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise HostsError(holder.stderr.read().decode().strip())
        yield holder.pid


def _configure(tool: str, pid: int, *lines: str) -> None:
    """Run lines of ip or tc in the network of a process. Raises HostsError."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", tool, "-batch", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HostsError(f"{tool}: {done.stderr.strip()}")


def _enter(pid: int, kinds: Sequence[str]) -> None:
    """Move this thread into namespaces of a process; threads and processes that it makes follow."""
    files = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    try:
        results = [_LIBC.unshare(_CLONE_FS), *(_LIBC.setns(file, 0) for file in files)]
        if any(results):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        for file in files:
            os.close(file)


@dataclass
class Host:
    """One host: `pid` is that of its namespaces' holder, `wire` that of the bridge's."""

    number: int
    pid: int
    wire: int
    ipv4: str
    ipv6: str
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def shm(self) -> Path:
        """Its /dev/shm, as seen from here."""
        return Path(f"/proc/{self.pid}/root/dev/shm")

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process on it, which is a child of ours: signals and exit status are as usual."""
        process: subprocess.Popen[bytes] = self._in_thread(
            _INSIDE, lambda: subprocess.Popen(command, **options)
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End what runs on it. Its namespaces do not end before we have taken note of each end."""
        for process in self._processes:
            process.kill()
            process.wait()

    def run(self, *command: str) -> str:
        """What a command says that succeeds on it."""
        done = self._in_thread(
            _INSIDE, lambda: subprocess.run(command, capture_output=True, text=True, check=True)
        )
        return done.stdout

    def call(self, function: Callable[[], T]) -> T:
        """Run it in a thread of ours on this host's network: sockets that are made there, by
        threads too that are begun there, are this host's."""
        return self._in_thread(_IN_NETWORK, function)

    def _in_thread(self, kinds: Sequence[str], function: Callable[[], T]) -> T:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_enter, self.pid, kinds).result()
            return thread.submit(function).result()

    def cut(self) -> None:
        """Pull its cable."""
        _configure("ip", self.wire, f"link set port{self.number} down")

    def mend(self) -> None:
        """Plug it in again."""
        _configure("ip", self.wire, f"link set port{self.number} up")

    def is_cut(self) -> bool:
        """Whether its own network card sees no carrier."""
        (card,) = json.loads(self.run("ip", "-json", "link", "show", "eth0"))
        return "NO-CARRIER" in card["flags"]

    def limit(self, rate: str) -> None:
        """So many bits a second each way, such as 1gbit."""
        shape = f"root tbf rate {rate} burst {_BURST_KIB[rate]}kb latency 50ms"
        _configure("tc", self.pid, f"qdisc replace dev eth0 {shape}")
        _configure("tc", self.wire, f"qdisc replace dev port{self.number} {shape}")

    def move(self, number: int) -> None:
        """Give it the addresses of another number."""
        _configure("ip", self.pid, "addr flush dev eth0")
        self.ipv4, self.ipv6 = _address(self.pid, number)


def _address(pid: int, number: int) -> tuple[str, str]:
    ipv4, ipv6 = f"10.77.0.{number}", f"fd77::{number}"
    _configure(
        "ip", pid, f"addr add {ipv4}/24 dev eth0", f"addr add {ipv6}/64 dev eth0 nodad",
        "link set eth0 up",
    )  # fmt: skip
    return ipv4, ipv6


class Network:
    """A bridge, and the hosts that are plugged into it, for as long as the context lasts."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._num_hosts = 0

    def __enter__(self) -> Network:
        setup = "ip link add lan type bridge mcast_snooping 0; ip link set lan up"
        with self._stack:  # whatever fails
            self._wire = self._stack.enter_context(_namespaces(["net"], setup))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def host(self) -> Host:
        """One more. Raises HostsError."""
        self._num_hosts += 1
        number = self._num_hosts
        setup = "mount -t tmpfs tmpfs /dev/shm; ip link set lo up"
        kinds = ("net", "mount", "pid", "fork", "mount-proc")
        pid = self._stack.enter_context(_namespaces(kinds, setup))
        _configure(
            "ip", self._wire, f"link add port{number} type veth peer name eth0 netns {pid}",
            f"link set port{number} master lan up",
        )  # fmt: skip
        host = Host(number, pid, self._wire, *_address(pid, number))
        self._stack.callback(host.close)
        return host


def why_none() -> str:
    """Why there can be no hosts here; "" where there can be."""
    try:
        with Network() as network:
            network.host().limit("1gbit")
    except (HostsError, OSError) as error:
        return f"{error} (needs iproute2 and root, or: {AS_ROOT})"
    return ""
