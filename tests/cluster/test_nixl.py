"""NIXL itself, where it is installed: bytes between two agents, and a cluster that uses it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.make_model import make_model
from tests.cluster.processes import ROOT, running
from tests.cluster.test_equality import VOCAB, ask, requests

_IS_THERE = find_spec("nixl_cu12") is not None
needs_nixl = pytest.mark.skipif(not _IS_THERE, reason="nixl-cu12 is not installed")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


_LOOPBACK = """
import os, sys
from pathlib import Path
from common.net.nixl import PIECE_BYTES, Pieces, load_agent
from kvbaton.errors import UnavailableError

def listening():
    ours = {os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.exists()}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                yield fields[1].partition(":")[0]

store, worker = (load_agent(name, "lo") for name in ("store", "worker"))
ours, theirs = (Pieces(agent, 2 * PIECE_BYTES, 4096) for agent in (store, worker))
name = store.meet(worker.metadata())
with ours.lent() as here, theirs.lent() as there, worker.busy():
    there.memory[:] = bytes(range(256)) * (PIECE_BYTES // 256)
    store.read(here.address, name, there.address, PIECE_BYTES)
    assert here.memory == there.memory
    here.memory[:] = b"x" * PIECE_BYTES
    store.write(here.address, name, there.address, PIECE_BYTES)
    assert here.memory == there.memory
    for verb in (store.read, store.write):
        try:
            verb(here.address, name, theirs.address + theirs.num_bytes, 1)
        except UnavailableError:
            continue
        raise SystemExit("memory that was not registered was reached")
    try:
        store.meet(b"garbage")
    except UnavailableError:
        print("right")
assert "torch" not in sys.modules
assert set(listening()) == {"0100007F"}, "the device that was named has 127.0.0.1, and no other"
for agent in (store, worker):
    agent.close()
"""


@needs_nixl
@pytest.mark.long
@pytest.mark.parametrize("ways", ["all", "tcp,self"])
def test_bytes_are_right_in_both_directions(ways: str) -> None:
    command = [sys.executable, "-c", f"import os; os.environ['UCX_TLS'] = {ways!r}\n{_LOOPBACK}"]
    ended = _run(command)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "right"


@needs_nixl
@pytest.mark.long
async def test_tokens_are_those_of_shared_memory(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", family="qwen3", vocab=VOCAB, head_dim=32, seed=3)
    outputs = {}
    for mover in ("shm", "nixl"):
        devices = {"nixl_devices": "lo"} if mover == "nixl" else {}
        worker: dict[str, Any] = {"model": model, "dtype": "float32", "batch_invariant": True}
        (tmp_path / mover).mkdir()
        with running(
            tmp_path / mover,
            store=devices,
            worker=worker | devices | {"mover": mover},
            gateway={"model": model},
        ) as cluster:
            outputs[mover] = await ask(f"tcp://127.0.0.1:{cluster.client_port}", requests())
            logs = {each.stem: each.read_text() for each in (tmp_path / mover).glob("*.log")}
        for name in ("prefill.1", "decode.1"):
            assert ("nixl_used" in logs[name]) is (mover == "nixl")
            assert "nixl_failed" not in logs[name]
    assert outputs["nixl"] == outputs["shm"]


@pytest.mark.skipif(_IS_THERE, reason="nixl-cu12 is installed")
def test_where_it_is_not_installed_a_store_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.kvstore", "--insecure", "true"]
    command += ["--nixl-devices", "lo", "--arena-dir", str(tmp_path), "--kv-bytes", "1M"]
    command += ["--bind", "tcp://127.0.0.1:*", "--data-bind", "tcp://127.0.0.1:*"]
    ended = _run(command)
    assert ended.returncode == 78
    assert "NIXL is not installed" in ended.stdout + ended.stderr
