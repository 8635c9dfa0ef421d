"""Requests that are cancelled at any moment, on real processes: nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from kvbaton import AsyncClient
from kvbaton.errors import KvbatonError
from tests.cluster.processes import ROOT, Cluster, metrics, running

BLOCK = MOCK_LAYOUT.block_size
NUM_BLOCKS = 256
MOCK = {"engine": "mock", "mock_step_ms": 2, "max_num_seqs": 8, "max_num_batched_tokens": 64}
NUM_AT_ONCE = 20
MOST_GROWTH_BYTES = 4 << 20  # of the store's memory; what 100 requests held was 12 times as much


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(5, 9)] * rng.randrange(5, 12 * BLOCK)


async def cancel_many(cluster: Cluster, rng: random.Random, num_cancels: int) -> None:
    """Cancel each after a while, or after some tokens; the longest run to their end."""

    async def cancel_one(client: AsyncClient) -> bool:
        stream = client.generate(token_ids=prompt(rng), max_tokens=200, temperature=0)
        num_tokens = rng.choice([0, 0, 1, 2, rng.randrange(60)])
        with contextlib.suppress(KvbatonError):
            if num_tokens == 0:
                await asyncio.sleep(rng.uniform(0, 0.15))
            else:
                async for token in stream:
                    if token.index + 1 >= num_tokens:
                        break
        stream.cancel()
        return stream.finish_reason is None

    async with AsyncClient(f"tcp://127.0.0.1:{cluster.client_port}") as client:
        num_done = 0
        while num_done < num_cancels:
            results = await asyncio.gather(*(cancel_one(client) for _ in range(NUM_AT_ONCE)))
            num_done += sum(results)


def held_blocks(cluster: Cluster) -> float:
    """Blocks that are neither free nor cache."""
    text = httpx.get(f"{cluster.base_url}/metrics").text
    stats = metrics(text)
    names = ("granted", "committed", "quarantined")
    return sum(stats[f"kvbaton_gateway_kv_blocks_{name}"] for name in names)


def memory_bytes(cluster: Cluster, name: str) -> int:
    """What the process holds beside the arena, which is shared memory."""
    status = Path(f"/proc/{cluster.processes[name].pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("mover", ["shm", "zmq"])
@pytest.mark.parametrize(
    "num_cancels", [100, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(300)])]
)
def test_cancelled_requests_leave_nothing(tmp_path: Path, mover: str, num_cancels: int) -> None:
    rng = random.Random(1)
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("only for this test, and long enough\n")
    store = {"kv_bytes": NUM_BLOCKS * MOCK_LAYOUT.block_bytes, "heartbeat_s": 0.2}
    with running(
        tmp_path,
        num_prefill=2,
        num_decode=2,
        store=store,
        worker=MOCK | {"mover": mover},
        gateway={"admin_key_file": key_file},
    ) as cluster:
        asyncio.run(cancel_many(cluster, rng, NUM_AT_ONCE))  # all that is made once is made
        before = memory_bytes(cluster, "kvstore.1")
        asyncio.run(cancel_many(cluster, rng, num_cancels))
        deadline = time.monotonic() + 20
        while held_blocks(cluster):
            assert time.monotonic() < deadline, held_blocks(cluster)
            time.sleep(0.1)
        assert memory_bytes(cluster, "kvstore.1") - before < MOST_GROWTH_BYTES
        with cluster.client() as client:
            tokens = client.generate(token_ids=[7] * 50, max_tokens=5, temperature=0)
            assert [token.token_id for token in tokens] == mock_output([7] * 50, 5)
        audit = subprocess.run(
            [
                sys.executable, "-m", "kvbaton", "audit",
                "--gateway", f"tcp://127.0.0.1:{cluster.client_port}",
                "--admin-key-file", str(key_file),
            ],
            cwd=ROOT, check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert audit.returncode == 0, audit
