"""docs/systemd.md from bare machines to a cluster of two hosts, one worker more, and other keys, on
hosts that are namespaces: the commands that it tells, without systemd."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.hosts import Host, Network, why_none
from tests.packaging.test_install import everything, install
from tests.packaging.units import Installed, Process

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
BODY = {
    "prompt": "def fibonacci(n):\n    return " * 8,
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_none():
        pytest.skip(f"no hosts of namespaces here: {reason}")
    with Network() as network:
        yield network


class Machine:
    """A host, and the root that kvbaton is installed into."""

    def __init__(self, host: Host, root: Path, *flags: str) -> None:
        self.host = host
        self.installed = Installed(root)
        self.settings = root / "etc/kvbaton"
        self.keys = self.settings / "keys"
        install(root, "--venv", sys.prefix, "--address", host.ipv4, *flags)
        with (self.settings / "common.env").open("a") as file:
            file.write(f"KVBATON_MODEL={ROOT}/models/demo\n")
            file.write(f"XDG_CACHE_HOME={Path.home() / '.cache'}\n")  # compiled kernels

    def start(self, role: str, number: int = 1) -> Process:
        is_gateway = role == "gateway"
        listener = self.host.call(self.installed.listener) if is_gateway else None
        process = Process(self.installed, role, number, listener=listener, popen=self.host.popen)
        if listener is not None:
            listener.close()
        return process

    def script(self, *words: str) -> str:
        """What a script of the installation says."""
        name, *flags = words
        path = self.installed.root / "opt/kvbaton/scripts" / name
        return self.host.run("env", f"KVBATON_KEYS={self.keys}", str(path), *flags)

    def close(self) -> None:
        shutil.rmtree(self.installed.root / "run")  # what stood for systemd had there
        install(self.installed.root, "--uninstall", "--purge")
        assert everything(self.installed.root) == {}


class Cluster:
    """One machine with gateway, store and prefill, and one with decode workers."""

    def __init__(self, folder: Path, network: Network) -> None:
        hosts = network.host(), network.host()
        self.store = f"tcp://{hosts[0].ipv4}:5570"
        self.one = Machine(hosts[0], folder / "one", "--role", "gateway,kvstore,prefill")
        flags = ("--role", "decode", "--instances", "decode=2", "--stores", self.store)
        self.two = Machine(hosts[1], folder / "two", *flags)
        self.running: dict[str, Process] = {}

    def make_keys(self) -> None:
        """New ones, and copies of those that the other machine needs."""
        self.one.script("keygen", str(self.one.keys))
        subprocess.run(["install", "-d", "-m", "700", self.two.keys], check=True)
        for name in ("decode.key", "public.json"):
            shutil.copy(self.one.keys / name, self.two.keys)

    def start(self, *names: str) -> None:
        """Wait until all of them can work."""
        for name in names:
            role, _, number = name.partition("-")
            machine = self.two if role == "decode" else self.one
            self.running[name] = machine.start(role, int(number))
        for name in names:
            self.running[name].wait_for("READY=1")

    def stop(self, *names: str) -> None:
        for name in names:
            process = self.running.pop(name)
            assert process.stop() == 0, process.log.read_text()

    def get(self, path: str) -> int:
        """The status."""
        return self.one.host.call(lambda: httpx.get(f"{URL}{path}")).status_code

    def num_cached(self) -> int:
        """Of a completion's prompt."""
        answer = self.one.host.call(
            lambda: httpx.post(f"{URL}/v1/completions", json=BODY, timeout=60)
        )
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == BODY["max_tokens"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.long
@pytest.mark.timeout(240)
def test_from_bare_machines_to_two_hosts_with_one_worker_more_and_other_keys(
    tmp_path: Path, network: Network
) -> None:
    cluster = Cluster(tmp_path, network)
    cluster.make_keys()
    cluster.start("decode-1", "gateway-1", "prefill-1", "kvstore-1", "decode-2")
    settings = cluster.two.settings
    said = cluster.two.script("doctor", "--role", "decode", "--settings", str(settings), "--json")
    found = [each["message"] for each in json.loads(said) if each["level"] == "ok"]
    asked = f"{cluster.store}, asked with the key of decode"
    assert any(each.startswith(asked) for each in found), said
    assert cluster.get("/ready") == 200
    assert cluster.num_cached() == 0
    # One worker more, and one less.
    shutil.copy(settings / "decode-1.env", settings / "decode-3.env")
    cluster.start("decode-3")
    cluster.stop("decode-1")
    assert cluster.num_cached() > 0
    # Other keys: the cache stays.
    for machine in (cluster.one, cluster.two):
        shutil.rmtree(machine.keys)
    cluster.make_keys()
    names = list(cluster.running)
    cluster.stop(*names)
    cluster.start(*names)
    assert cluster.num_cached() > 0
    cluster.stop(*names)
    for machine in (cluster.one, cluster.two):
        machine.close()
