"""SIGKILL of a real store under load: its cache survives, and every stream ends with its tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.kv.arena import ARENA_PREFIX
from kvbaton import Client
from kvbaton.errors import KvbatonError
from tests.cluster.processes import ROOT, Cluster, running

BLOCK = MOCK_LAYOUT.block_size
MOCK = {"engine": "mock", "mock_step_ms": 4, "mock_token_ms": 0.01}
STORE = {"kv_bytes": "16M", "lost_after_s": 1, "heartbeat_s": 0.2}
NUM_TOKENS = 300


def prompt(number: int) -> list[int]:
    return [number] * (10 * BLOCK) + [1]


def cached(client: Client, tokens: list[int]) -> int:
    """Serve one request. Returns how many of its tokens were cached."""
    stream = client.generate(token_ids=tokens, max_tokens=3, temperature=0)
    assert [token.token_id for token in stream] == mock_output(tokens, 3)
    assert stream.usage is not None
    return stream.usage.num_cached_tokens


def until_served(client: Client, tokens: list[int]) -> int:
    """As `cached`, when the processes have found one another again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return cached(client, tokens)
        except KvbatonError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def audit(cluster: Cluster, key_file: Path) -> bool:
    """Whether it closes."""
    endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
    flags = ["--gateway", endpoint, "--admin-key-file", str(key_file), "--json"]
    command = [sys.executable, "-m", "kvbaton", "audit", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    closes: bool = json.loads(done.stdout)["closes"]
    return closes


@pytest.mark.parametrize("mover", ["auto", "zmq"])
def test_a_killed_store_keeps_its_cache_and_loses_no_stream(tmp_path: Path, mover: str) -> None:
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("only the operators of this cluster know it\n")
    with (
        running(
            tmp_path,
            num_decode=2,
            worker=MOCK | {"mover": mover},
            store=STORE,
            gateway={"admin_key_file": key_file},
        ) as cluster,
        cluster.client() as client,
    ):
        assert cached(client, prompt(5)) == 0
        numbers = range(6, 14)
        streams = [
            client.generate(token_ids=prompt(number), max_tokens=NUM_TOKENS, temperature=0)
            for number in numbers
        ]
        firsts = [next(stream).token_id for stream in streams]
        files = sorted(path.stat().st_ino for path in cluster.arena_dir.iterdir())
        cluster.kill("kvstore.1")
        cluster.start("kvstore", 1, **STORE)
        for number, first, stream in zip(numbers, firsts, streams, strict=True):
            tokens = [first, *(token.token_id for token in stream)]
            assert tokens == mock_output(prompt(number), NUM_TOKENS)
        assert until_served(client, prompt(5)) == 10 * BLOCK
        assert audit(cluster, key_file)
        # They are the dead store's own, and go with an orderly end.
        assert sorted(path.stat().st_ino for path in cluster.arena_dir.iterdir()) == files
        assert cluster.terminate("kvstore.1") == 0
        assert list(cluster.arena_dir.glob(ARENA_PREFIX + "*")) == []
