"""Real processes: one request in every log, a level changed at run time, a worker drained, other
addresses than 127.0.0.1."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.engine.mock import mock_output
from common.service import EXIT_MISCONFIGURED
from kvbaton import Client
from tests.cluster.processes import ROOT, Cluster, running
from tests.ports import free_ports

KEY = "only the operators of this cluster know it"
MOCK: dict[str, Any] = {"engine": "mock"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operations") / "key"
    path.touch(mode=0o600)
    path.write_text(KEY + "\n")
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, key_file: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    gateway = {"admin_key_file": key_file}
    with running(folder, num_decode=2, worker=MOCK, gateway=gateway) as cluster:
        yield cluster


def kvbaton(cluster: Cluster, key_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
    flags = ["--gateway", endpoint, "--admin-key-file", str(key_file)]
    command = [sys.executable, "-m", "kvbaton", arguments[0], *flags, *arguments[1:]]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def log_of(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    lines = (cluster.folder / f"{name}.log").read_text().splitlines()
    return [json.loads(line) for line in lines]


def named(cluster: Cluster, process: str, request_id: str) -> list[dict[str, Any]]:
    """The events of a process that name a request; the last may come after its answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [each for each in log_of(cluster, process) if each.get("request") == request_id]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{process} has not named {request_id}\n{cluster.logs()}")


def test_a_request_goes_by_one_id_in_the_log_of_every_process_it_passed(cluster: Cluster) -> None:
    with cluster.client() as client:
        done = client.generate(token_ids=[7] * 40, max_tokens=8, temperature=0).finish()
    assert done.timings is not None
    passed = ["gateway.1", "kvstore.1", done.timings.prefill_worker, done.timings.decode_worker]
    for name in passed:
        events = named(cluster, name, done.request_id)
        assert {each["service"] for each in events} == {name}
    body = {"prompt": "x = 1\n" * 10, "max_tokens": 4}
    answer = httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=60)
    for name in ("gateway.1", "kvstore.1", "prefill.1"):
        named(cluster, name, answer.headers["x-request-id"])


def test_a_level_changes_while_the_processes_serve(cluster: Cluster, key_file: Path) -> None:
    everyone = ["decode.1", "decode.2", "gateway.1", "kvstore.1", "prefill.1"]
    done = kvbaton(cluster, key_file, "log-level", "all", "debug", "--json")
    assert (done.returncode, json.loads(done.stdout)["names"]) == (0, everyone), done
    with cluster.client() as client:
        request = client.generate(token_ids=[9] * 40, max_tokens=8, temperature=0).finish()
    store = [each for each in log_of(cluster, "kvstore.1") if each.get("level") == "debug"]
    assert request.request_id in {each.get("request") for each in store}
    assert kvbaton(cluster, key_file, "log-level", "kvstore.1", "info").returncode == 0
    for name in everyone:
        changes = [each["now"] for each in log_of(cluster, name) if "now" in each]
        assert changes == (["debug", "info"] if name == "kvstore.1" else ["debug"])


def test_a_worker_is_drained_under_load_and_said_to_be(cluster: Cluster, key_file: Path) -> None:
    prompts = [[11 + index] * 30 for index in range(8)]
    with cluster.client() as client:
        streams = [
            client.generate(token_ids=prompt, max_tokens=200, temperature=0) for prompt in prompts
        ]
        for stream in streams:
            next(stream)
        done = kvbaton(cluster, key_file, "drain", "decode.2")
        assert done.returncode == 0, done
        assert done.stdout.startswith("decode.2 is drained: it holds nothing")
        for prompt, stream in zip(prompts, streams, strict=True):
            rest = [token.token_id for token in stream]
            assert rest == mock_output(prompt, 200)[1:]
    shown = json.loads(kvbaton(cluster, key_file, "status", "--json").stdout)
    states = {each["name"]: each["state"] for each in shown["members"]}
    assert (states["decode.1"], states["decode.2"]) == ("ready", "drained")
    refused = kvbaton(cluster, key_file, "drain", "decode.1")
    assert refused.returncode == 2
    assert "no other decode worker takes work" in refused.stderr
    assert cluster.terminate("decode.2") == 0


# ---- addresses ----------------------------------------------------------------------------------


def test_a_worker_that_comes_back_at_another_address_is_found_again(tmp_path: Path) -> None:
    with (
        running(tmp_path, worker=MOCK | {"mock_step_ms": 20}) as cluster,
        cluster.client() as client,
    ):
        prompt = [7] * 40
        stream = client.generate(token_ids=prompt, max_tokens=60, temperature=0)
        next(stream)
        cluster.kill("decode.1")
        cluster.start("decode", bind="tcp://127.0.0.2:*", **MOCK)
        assert [token.token_id for token in stream] == mock_output(prompt, 60)[1:]
        cluster.terminate("decode.1")
        # Bound everywhere, told of by name.
        cluster.start("decode", bind="tcp://0.0.0.0:*", advertise="localhost", **MOCK)
        done = client.generate(token_ids=prompt, max_tokens=10, temperature=0).finish()
        assert done.finish_reason == "length"
        # Bound everywhere, and not told of.
        cluster.start("decode", 2, bind="tcp://0.0.0.0:*", **MOCK)
        assert cluster.processes.pop("decode.2").wait(30) == EXIT_MISCONFIGURED
        (error,) = [each for each in log_of(cluster, "decode.2") if each["level"] == "error"]
        assert "--advertise HOST must say which one others use" in error["reason"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback")
def test_a_whole_cluster_on_ipv6(tmp_path: Path) -> None:
    control, data = free_ports(2)
    with Cluster(tmp_path) as cluster:
        cluster.stores = f"tcp://[::1]:{control}"
        binds: dict[str, Any] = {
            "bind": f"tcp://[::1]:{control}",
            "data_bind": f"tcp://[::]:{data}",
        }
        cluster.start("kvstore", kv_bytes="64M", **binds)
        # The zmq mover reaches the data socket, which takes every address, by the store's own.
        cluster.start("prefill", bind="tcp://[::1]:*", mover="zmq", **MOCK)
        cluster.start("decode", bind="tcp://[::]:*", advertise="::1", mover="zmq", **MOCK)
        cluster.start("gateway", host="::1", bind=f"tcp://[::1]:{cluster.client_port}")
        cluster.base_url = f"http://[::1]:{cluster.http_port}"
        cluster.wait_ready(2)
        prompt = [7] * 40
        assert cluster.keys is not None
        with Client(f"tcp://[::1]:{cluster.client_port}", keys=cluster.keys) as client:
            tokens = client.generate(token_ids=prompt, max_tokens=20, temperature=0)
            assert [token.token_id for token in tokens] == mock_output(prompt, 20)
