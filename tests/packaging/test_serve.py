"""scripts/serve and the Procfile with the real services, on the mock engine."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from kvbaton import Client
from tests.ports import free_cluster_port

ROOT = Path(__file__).resolve().parents[2]
MARKER = "KVBATON_TEST_MARKER"

Start = Callable[..., "subprocess.Popen[str]"]


class Cluster:
    """Processes that carry a marker in their environment, so that each can be found again."""

    def __init__(self, tmp_path: Path) -> None:
        self.http_port = free_cluster_port()
        self.arenas = tmp_path / "arenas"
        self.arenas.mkdir()
        self._marker = uuid.uuid4().hex
        self.environ = {
            MARKER: self._marker,
            "KVBATON_ARENA_DIR": str(self.arenas),
            "KVBATON_KV_BYTES": "8M",
            "KVBATON_ENGINE": "mock",
            "KVBATON_HTTP_PORT": str(self.http_port),
        }

    def processes(self) -> dict[int, str]:
        """The command lines of all that run, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._marker.encode() in (path / "environ").read_bytes():
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(path.name)] = command.decode()
        return {pid: command for pid, command in found.items() if command}

    def service(self, role: str) -> int:
        """The process id of the first service of a role."""
        commands = self.processes().items()
        return min(pid for pid, command in commands if f"-m services.{role}" in command)

    def wait_until_gone(self) -> None:
        """Wait for the end of every process."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                select.select([pidfd], [], [])
                os.close(pidfd)

    def get(self, path: str) -> bytes:
        """What the gateway answers over HTTP."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}") as response:
            body: bytes = response.read()
        return body


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Start]:
    """Starts a command that runs the cluster, and kills what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **environ: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | cluster.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for pid in cluster.processes():
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()
        out(process).close()


def out(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def read_until(lines: IO[str], part: str) -> str:
    """The lines up to one that has `part`."""
    text = ""
    for line in lines:
        text += line
        if part in line:
            return text
    pytest.fail(f"no line {part!r} in {text}")


def address(text: str, name: str) -> str:
    """What scripts/serve printed as the address of `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.split()[-1]


def test_serve_shows_a_sample_and_leaves_nothing(cluster: Cluster, start: Start) -> None:
    serve = start("-m", "scripts.cluster.serve", "--decode", "2")
    text = read_until(out(serve), "Ctrl-C stops everything.")
    for part in ("def fibonacci(n):", "placed on prefill.1 and decode.", "first token"):
        assert part in text
    assert json.loads(cluster.get("/v1/models"))["object"] == "list"
    assert b"kvbaton" in cluster.get("/metrics")
    (keys,) = re.findall(r'Client\("tcp://.*", keys="(.*)"\)', text)
    with Client(address(text, "msgpack"), keys=keys) as client:
        assert len(list(client.generate("a prompt", max_tokens=5, ignore_eos=True))) == 5
    serve.send_signal(signal.SIGINT)
    rest, _ = serve.communicate()
    assert serve.returncode == 0
    assert rest == "stopping\nstopped\n"
    assert cluster.processes() == {}
    assert list(cluster.arenas.iterdir()) == []


def test_a_colocated_cluster_needs_no_prefill_workers(cluster: Cluster, start: Start) -> None:
    flags = ("--mode", "colocated", "--decode", "1", "--insecure")
    serve = start("-m", "scripts.cluster.serve", *flags)
    text = read_until(out(serve), "Ctrl-C stops everything.")
    assert "placed on decode.1\n" in text
    assert "keys=" not in text
    assert not any("services.prefill" in command for command in cluster.processes().values())
    serve.terminate()
    assert serve.wait() == 0


def test_nothing_outlives_a_killed_serve(cluster: Cluster, start: Start) -> None:
    serve = start("-m", "scripts.cluster.serve", "--no-sample")
    read_until(out(serve), "Ctrl-C stops everything.")
    serve.kill()
    cluster.wait_until_gone()
    assert list(cluster.arenas.iterdir()) == []


def test_a_killed_service_comes_back(cluster: Cluster, start: Start) -> None:
    serve = start("-m", "scripts.cluster.serve", "--no-sample", "--verbose")
    read_until(out(serve), "Ctrl-C stops everything.")
    os.kill(cluster.service("decode"), signal.SIGKILL)
    text = read_until(out(serve), "was killed by SIGKILL")
    assert "decode.1" in text
    read_until(out(serve), "worker ready")
    cluster.get("/health")
    serve.terminate()
    serve.communicate()
    assert serve.returncode == 0


def test_streams_outlive_every_service_that_is_killed(cluster: Cluster, start: Start) -> None:
    """With one process of each role: the keeper brings back what a stream waits for."""
    serve = start("-m", "scripts.cluster.serve", "--no-sample")
    text = read_until(out(serve), "Ctrl-C stops everything.")
    (keys,) = re.findall(r'Client\("tcp://.*", keys="(.*)"\)', text)
    with Client(address(text, "msgpack"), keys=keys) as client:

        def tokens(prompt: str, kill: int = 0) -> list[int]:
            found = []
            for token in client.generate(prompt, max_tokens=150, temperature=0, ignore_eos=True):
                found.append(token.token_id)
                if len(found) == 20 and kill:
                    os.kill(kill, signal.SIGKILL)
            return found

        expected = {prompt: tokens(prompt) for prompt in ("one prompt", "another")}
        for role in ("prefill", "decode", "kvstore", "gateway"):
            before = cluster.service(role)
            assert tokens("one prompt", kill=before) == expected["one prompt"]
            assert tokens("another") == expected["another"]  # it may not be back yet
            assert cluster.service(role) != before
    serve.terminate()
    assert serve.wait() == 0


def test_wrong_settings_end_the_start_with_the_reason(cluster: Cluster, start: Start) -> None:
    serve = start("-m", "scripts.cluster.serve", "--kv-bytes", "much")
    text, _ = serve.communicate()
    assert serve.returncode == 1
    assert "--kv-bytes must be of type int, got 'much'" in text
    assert "kvstore.1: ended with status 2: its settings are wrong\n" in text
    assert cluster.processes() == {}


def test_the_procfile_works_under_honcho_alone(cluster: Cluster, start: Start) -> None:
    honcho = start("-m", "honcho", "start", "--env", os.devnull, "-c", "prefill=2,decode=2")
    ready: set[str] = set()
    while ready != {"prefill.1", "prefill.2", "decode.1", "decode.2"}:
        line = read_until(out(honcho), '"event": "worker_ready"').splitlines()[-1]
        ready.add(line.split()[1])
    honcho.terminate()
    honcho.communicate()
    assert honcho.returncode == 128 + signal.SIGTERM
    assert cluster.processes() == {}
    assert list(cluster.arenas.iterdir()) == []
