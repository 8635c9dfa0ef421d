"""docs/systemd.md from bare machines to a cluster of two hosts, and one worker more, on hosts that
are namespaces: the commands that it tells, without systemd."""

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
BODY = {"prompt": "def f(x):\n", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


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


@pytest.mark.long
@pytest.mark.timeout(240)
def test_from_bare_machines_to_two_hosts_and_one_worker_more(
    tmp_path: Path, network: Network
) -> None:
    hosts = network.host(), network.host()
    stores = f"tcp://{hosts[0].ipv4}:5570"
    one = Machine(hosts[0], tmp_path / "one", "--role", "gateway,kvstore,prefill")
    flags = ("--role", "decode", "--instances", "decode=2", "--stores", stores)
    two = Machine(hosts[1], tmp_path / "two", *flags)
    one.script("keygen", str(one.keys))
    subprocess.run(["install", "-d", "-m", "700", two.keys], check=True)
    for name in ("decode.key", "public.json"):
        shutil.copy(one.keys / name, two.keys)

    started = [two.start("decode", 1), one.start("gateway"), one.start("prefill")]
    started += [one.start("kvstore"), two.start("decode", 2)]
    for process in started:
        process.wait_for("READY=1")
    said = two.script("doctor", "--role", "decode", "--settings", str(two.settings), "--json")
    found = [each["message"] for each in json.loads(said) if each["level"] == "ok"]
    assert any(each.startswith(f"{stores}, asked with the key of decode") for each in found), said
    assert _get(one, "/ready") == 200
    _ask(one)
    # One worker more, and one less.
    shutil.copy(two.settings / "decode-1.env", two.settings / "decode-3.env")
    started.append(two.start("decode", 3))
    started[-1].wait_for("READY=1")
    for process in (started.pop(0), started.pop(3)):
        assert process.stop() == 0, process.log.read_text()
    _ask(one)
    for process in reversed(started):
        assert process.stop() == 0, process.log.read_text()
    one.close()
    two.close()


def _get(machine: Machine, path: str) -> int:
    return machine.host.call(lambda: httpx.get(f"http://127.0.0.1:8000{path}")).status_code


def _ask(machine: Machine) -> None:
    url = "http://127.0.0.1:8000/v1/completions"
    answer = machine.host.call(lambda: httpx.post(url, json=BODY, timeout=60))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
