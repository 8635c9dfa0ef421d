"""A cluster of several hosts: each process on one of its own unless said otherwise, with copies of
the keys that its host needs, and started as an operator would."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common.net.access import PUBLIC_FILE
from kvbaton import ask
from kvbaton.keys import key_file_name
from kvbaton.operations import Standing
from tests.cluster.hosts import Network
from tests.cluster.processes import ROOT, Cluster

T = TypeVar("T")

ADMIN_KEY = "only the operators of this cluster know it"
CONTROL_PORT, DATA_PORT, CLIENT_PORT, HTTP_PORT = 5570, 5571, 5555, 8000
_NAMES = ("gateway.1", "kvstore.1", "prefill.1", "prefill.2", "decode.1", "decode.2")


class SpreadCluster(Cluster):
    """`hosts` by the names of the processes that run there; `desk` is where clients and operators
    are. Everything is bound to all addresses of its host, and reached at the one that is told."""

    def __init__(
        self,
        folder: Path,
        network: Network,
        *,
        shared: Mapping[str, str] | None = None,
        ipv6: bool = False,
    ) -> None:
        """`shared`: names of processes that run on the host of another."""
        super().__init__(folder)
        self._ipv6 = ipv6
        self.desk = network.host()
        self.hosts = {name: network.host() for name in _NAMES if name not in (shared or {})}
        self.hosts |= {name: self.hosts[other] for name, other in (shared or {}).items()}
        self.stores = f"tcp://{self.address('kvstore.1')}:{CONTROL_PORT}"
        self.endpoint = f"tcp://{self.address('gateway.1')}:{CLIENT_PORT}"
        self.base_url = f"http://{self.address('gateway.1')}:{HTTP_PORT}"
        self._admin_key = folder / "admin-key"
        self._admin_key.touch(mode=0o600)
        self._admin_key.write_text(ADMIN_KEY)

    def address(self, name: str) -> str:
        """Of a process's host, as in a URL."""
        host = self.hosts[name]
        return f"[{host.ipv6}]" if self._ipv6 else host.ipv4

    def start_all(self, settings: Mapping[str, dict[str, Any]]) -> None:
        """Settings by role. Returns when the gateway knows all workers."""
        for name in self.hosts:
            role, _, number = name.partition(".")
            self.start(role, int(number), **settings[role])
        self.wait_ready(len(self.hosts) - 2)

    def wait_ready(self, num_workers: int) -> None:
        wait = super().wait_ready
        self.at_desk(lambda: wait(num_workers))

    def at_desk(self, function: Callable[[], T]) -> T:
        """On the network of those who use the cluster."""
        return self.desk.call(function)

    def status(self) -> Standing:
        """Who is there, as an operator sees it."""
        return self.at_desk(lambda: ask.status(self.endpoint, ADMIN_KEY))

    def _popen(self, name: str, command: list[str], **outputs: Any) -> subprocess.Popen[bytes]:
        return self.hosts[name].popen(command, cwd=ROOT, **outputs)

    def _flags(self, role: str, number: int) -> dict[str, Any]:
        name = f"{role}.{number}"
        everywhere, address = ("[::]" if self._ipv6 else "0.0.0.0"), self.address(name)
        flags: dict[str, Any] = {"keys": self._copied_keys(role, name)}
        if role == "gateway":
            return flags | {
                "stores": self.stores,
                "bind": f"tcp://{everywhere}:{CLIENT_PORT}",
                "host": everywhere.strip("[]"),
                "http_port": HTTP_PORT,
                "open_http": True,
                "admin_key_file": self._admin_key,
            }
        if role == "kvstore":
            return flags | {
                "bind": f"tcp://{everywhere}:{CONTROL_PORT}",
                "data_bind": f"tcp://{everywhere}:{DATA_PORT}",
            }
        bind = f"tcp://{everywhere}:*"
        return flags | {"stores": self.stores, "bind": bind, "advertise": address}

    def _copied_keys(self, role: str, name: str) -> Path:
        """What a host of this role is given: its own key, and the public ones."""
        assert self.keys is not None
        folder = self.folder / f"keys-{name}"
        folder.mkdir(mode=0o700, exist_ok=True)
        for file in (key_file_name(role), PUBLIC_FILE):
            shutil.copy(self.keys / file, folder)
        return folder
