"""scripts/install into a scratch root: what it makes, keeps, takes away; a cluster from there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.kv.layout import KvLayout
from scripts.cluster.keys import make_keys
from scripts.host.ask_store import ask_store
from scripts.host.checks import findings
from scripts.host.env_files import instances
from scripts.host.findings import ERROR
from scripts.host.gather import gather
from tests.packaging.units import Installed, Process
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]


def install(root: Path, *flags: str, status: int = 0) -> list[str]:
    """The lines it prints; with another status, those on stderr."""
    command = [str(ROOT / "scripts/install"), "--root", str(root), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, done.stderr
    return (done.stderr if status else done.stdout).splitlines()


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Every path below, with its time of change and mode."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in root.rglob("*")
    }


def test_a_dry_run_says_what_would_be_and_does_nothing(tmp_path: Path) -> None:
    said = install(tmp_path, "--dry-run", "--role", "decode", "--stores", "tcp://10.0.0.1:5570")
    assert "write /etc/systemd/system/kvbaton-decode@.service" in said
    assert "write /etc/kvbaton/decode-1.env" in said
    assert not any("etc/systemd/system/kvbaton-gateway" in line for line in said)
    assert everything(tmp_path) == {}


def test_a_second_run_changes_nothing_and_settings_are_the_operators(tmp_path: Path) -> None:
    flags = ["--venv", sys.prefix, "--prefix", "/srv/kv", "--instances", "decode=2"]
    install(tmp_path, *flags)
    before = everything(tmp_path)
    assert install(tmp_path, *flags) == []
    manifest = "srv/kv/.installed.json"
    after = everything(tmp_path)
    assert {name for name in after if after[name] != before[name]} <= {manifest, "srv/kv"}
    unit = (tmp_path / "etc/systemd/system/kvbaton-decode@.service").read_text()
    assert "ExecStart=/srv/kv/.venv/bin/python" in unit
    assert "/opt/kvbaton" not in unit
    settings = tmp_path / "etc/kvbaton/decode-2.env"
    settings.write_text("KVBATON_THREADS=4\n")
    (tmp_path / "srv/kv/common/cpus.py").write_text("damaged")
    assert install(tmp_path, *flags) == ["write /srv/kv/common/cpus.py"]
    assert settings.read_text() == "KVBATON_THREADS=4\n"
    fewer = install(tmp_path, *flags[:4], "--role", "kvstore,prefill")
    assert "remove /etc/systemd/system/kvbaton-decode@.service" in fewer
    assert "keep, it was changed: /etc/kvbaton/decode-2.env" in fewer
    assert install(tmp_path, "--prefix", "/srv/kv", "--uninstall")
    assert {name for name in everything(tmp_path) if name.endswith(".env")} == {
        "etc/kvbaton/decode-2.env"
    }
    install(tmp_path, "--prefix", "/srv/kv", "--uninstall", status=2)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--role", "router"], "--role takes gateway, kvstore, prefill, decode, got 'router'"),
        (["--role", "decode"], "--stores: without a KV store on this host, name those of others"),
        (["--instances", "decode=0"], "--instances takes ROLE=N"),
        (["--prefix", "/opt/kv baton"], "--prefix must be an absolute path of letters"),
        (["--http", "8000"], "--http must be ADDRESS:PORT, got '8000'"),
        (["--address", "10.0.0.1:5"], "--address must be a name or an address"),
        (["--venv", "/nowhere"], "--venv /nowhere holds no bin/python"),
        (["--uninstall"], "--prefix /opt/kvbaton: nothing is installed there"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, flags: list[str], reason: str) -> None:
    (said,) = install(tmp_path, *flags, status=2)
    assert reason in said
    assert everything(tmp_path) == {}


def test_hosts_of_a_larger_cluster_are_told_where_the_others_are(tmp_path: Path) -> None:
    flags = ["--venv", sys.prefix, "--address", "10.0.0.2", "--stores", "tcp://10.0.0.1:5570"]
    install(tmp_path, *flags, "--role", "gateway,decode", "--instances", "gateway=2")
    settings = tmp_path / "etc/kvbaton"
    assert "KVBATON_STORES=tcp://10.0.0.1:5570\n" in (settings / "common.env").read_text()
    assert "KVBATON_BIND=tcp://10.0.0.2:5556\n" in (settings / "gateway-2.env").read_text()
    assert "KVBATON_BIND=tcp://10.0.0.2:*\n" in (settings / "decode-1.env").read_text()


# ---- a cluster from there -----------------------------------------------------------------------


class Host:
    """A scratch root with a cluster in it, and the processes that run from there."""

    def __init__(self, root: Path, arena_dir: Path) -> None:
        self.installed = Installed(root)
        self.arena_dir = arena_dir
        self.running: dict[str, Process] = {}
        self.http_port, *ports = free_ports(4)
        install(root, "--venv", sys.prefix, "--http", f"127.0.0.1:{self.http_port}")
        self.settings = root / "etc/kvbaton"
        self.keys = self.settings / "keys"
        self.store = f"tcp://127.0.0.1:{ports[0]}"
        make_keys(self.keys)
        self._edit("common", f"KVBATON_STORES={self.store}")
        self._edit("gateway-1", f"KVBATON_BIND=tcp://127.0.0.1:{ports[2]}")
        self._edit(
            "kvstore-1",
            f"KVBATON_BIND={self.store}\n"
            f"KVBATON_DATA_BIND=tcp://127.0.0.1:{ports[1]}\n"
            f"KVBATON_ARENA_DIR={arena_dir}\nKVBATON_KV_BYTES=32M",
        )
        kernels = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        for worker in ("prefill-1", "decode-1"):
            self._edit(worker, f"XDG_CACHE_HOME={kernels}")  # to compile them takes long
        self.listener = self.installed.listener()

    def _edit(self, name: str, lines: str) -> None:
        with (self.settings / f"{name}.env").open("a") as file:
            file.write(lines + "\n")

    def start(self, role: str) -> Process:
        listener = self.listener if role == "gateway" else None
        self.running[role] = Process(self.installed, role, 1, listener=listener)
        return self.running[role]

    def close(self) -> None:
        self.listener.close()
        for process in self.running.values():
            process.kill()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    arena_dir = Path(tempfile.mkdtemp(prefix="kvbaton-test-", dir="/dev/shm"))
    host = Host(tmp_path / "root", arena_dir)
    yield host
    host.close()
    shutil.rmtree(arena_dir)


def ask(host: Host) -> dict[str, Any]:
    """One completion, on a connection of its own."""
    body = {
        "prompt": "def fibonacci(n):\n    return " * 4,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    url = f"http://127.0.0.1:{host.http_port}/v1/completions"
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_cluster_runs_from_its_units_and_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = [host.start(role) for role in ("gateway", "prefill", "decode", "kvstore")]
    for process in processes:
        lines = process.wait_for("READY=1")
        assert any(line.startswith("STATUS=") for line in lines[:-1]), lines
        process.wait_for("WATCHDOG=1")
        process.wait_for("STATUS=serving: ")
    loading = host.running["decode"].supervisor.heard
    assert [line.split("/")[0] for line in loading[:2]] == [
        "STATUS=loading ",
        "STATUS=waiting for tcp:",
    ]
    answer = ask(host)
    assert answer["usage"]["completion_tokens"] == 8

    _examine(host)
    _ask_the_store(host, monkeypatch)
    _restart_the_gateway(host)
    _restart_the_store(host, answer)
    for role in ("gateway", "decode", "prefill", "kvstore"):
        process = host.running.pop(role)
        assert process.stop() == 0, process.log.read_text()
        assert "STOPPING=1" in process.supervisor.heard
    _uninstall(host)


def _examine(host: Host) -> None:
    """What the doctor finds out of the host that the cluster runs on."""
    roles = ("gateway", "kvstore")
    settings = list(instances(host.settings, roles, {"KVBATON_KEYS": str(host.keys)}))
    facts = gather(roles, settings, load_model=False)
    assert [finding for finding in findings(facts) if finding.level == ERROR] == []
    assert [(bind.owner, bind.error) for bind in facts.binds] == [
        ("gateway.1", "Address already in use"),
        ("kvstore.1", "Address already in use"),
        ("kvstore.1", "Address already in use"),
    ]
    assert {key.mode for key in facts.keys} == {0o700, 0o644, 0o600}
    assert facts.arenas[0].wanted_bytes == 32 << 20
    assert len(facts.stores[0].fingerprint) == 64


def _ask_the_store(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers of this cluster, of another model, of another release, of another cluster."""
    strangers = host.installed.root / "run/strangers"
    make_keys(strangers)
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=16, block_size=16, dtype="float32")
    assert ask_store(host.store, "decode", host.keys, "", None).problem == ""
    other = ask_store(host.store, "decode", host.keys, "0" * 64, layout)
    assert (other.field, other.is_open) == ("fingerprint", True)
    monkeypatch.setattr("scripts.host.ask_store.INTERNAL_VERSION", 1)
    assert (
        "version 1 is not supported"
        in ask_store(host.store, "prefill", host.keys, "", None).problem
    )
    monkeypatch.setattr("scripts.host.ask_store.TIMEOUT_S", 0.5)
    assert "does not know this key" in ask_store(host.store, "decode", strangers, "", None).problem
    nobody = ask_store(f"tcp://127.0.0.1:{free_ports(1)[0]}", "decode", host.keys, "", None)
    assert (nobody.is_open, nobody.problem) == (False, "cannot connect: Connection refused")


def _restart_the_gateway(host: Host) -> None:
    """Whoever connects while no gateway runs waits for the next one."""
    assert host.running.pop("gateway").stop() == 0
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", host.http_port)):
        waiting = pool.submit(ask, host)
        host.start("gateway").wait_for("READY=1")
        assert waiting.result()["usage"]["completion_tokens"] == 8


def _restart_the_store(host: Host, answer: dict[str, Any]) -> None:
    """An orderly restart keeps the arena, and the cache in it."""
    files = sorted(path.stat().st_ino for path in host.arena_dir.iterdir())
    assert host.running.pop("kvstore").stop() == 0
    assert sorted(path.stat().st_ino for path in host.arena_dir.iterdir()) == files
    host.start("kvstore").wait_for("READY=1")
    again = ask(host)
    assert again["choices"][0]["text"] == answer["choices"][0]["text"]
    assert cached(again) > 0


def _uninstall(host: Host) -> None:
    root = host.installed.root
    shutil.rmtree(root / "run")  # what stood for systemd had there
    install(root, "--uninstall", "--purge")
    assert everything(root) == {}
