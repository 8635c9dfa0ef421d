"""Real stores: what the disk keeps over a kill, and what is missing while a shard is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from kvbaton import Client
from kvbaton.errors import KvbatonError
from tests.cluster.processes import running

BLOCK = MOCK_LAYOUT.block_size
MOCK = {"engine": "mock", "mock_step_ms": 1, "mock_token_ms": 0.01}
NUM_BLOCKS = 96


def prompt(number: int) -> list[int]:
    return [number] * (20 * BLOCK) + [1]


def serve(client: Client, tokens: list[int]) -> int:
    """Serve one request. Returns how many of its tokens were cached."""
    stream = client.generate(token_ids=tokens, max_tokens=3, temperature=0)
    assert [token.token_id for token in stream] == mock_output(tokens, 3)
    assert stream.usage is not None
    return stream.usage.num_cached_tokens


def eventually(call: Callable[[], int], least: int) -> None:
    """Until it returns so much; while processes find one another again it may fail."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if call() >= least:
                return
        except KvbatonError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_store_finds_on_the_disk_what_memory_had_no_room_for(tmp_path: Path) -> None:
    store = {
        "kv_bytes": NUM_BLOCKS * MOCK_LAYOUT.block_bytes,
        "disk_dir": tmp_path / "disk",
        "disk_bytes": "16M",
        "lost_after_s": 1,
        "heartbeat_s": 0.2,
    }
    with running(tmp_path, worker=MOCK, store=store) as cluster, cluster.client() as client:
        for number in range(5, 25):
            assert serve(client, prompt(number)) == 0
        assert serve(client, prompt(5)) == 20 * BLOCK
        cluster.kill("kvstore.1")
        cluster.start("kvstore", 1, **store)
        eventually(lambda: serve(client, prompt(6)), 20 * BLOCK)
        assert serve(client, prompt(7)) == 20 * BLOCK


@pytest.mark.parametrize("lost", [1, 2])
def test_while_a_shard_is_lost_only_its_cache_is_missing(tmp_path: Path, lost: int) -> None:
    store = {"kv_bytes": "16M", "lost_after_s": 1, "heartbeat_s": 0.2}
    with (
        running(tmp_path, num_stores=2, worker=MOCK, store=store) as cluster,
        cluster.client() as client,
    ):
        prompts = [prompt(number) for number in range(5, 25)]
        assert [serve(client, tokens) for tokens in prompts] == [0] * 20
        assert [serve(client, tokens) for tokens in prompts] == [20 * BLOCK] * 20
        cluster.kill(f"kvstore.{lost}")
        found = [_served(client, tokens) for tokens in prompts]
        assert 0 < found.count(0) < 20
        # When the shard is back it gets its prompts again, and has kept their blocks.
        cluster.start("kvstore", lost, **store)
        log = tmp_path / "gateway.1.log"
        eventually(lambda: log.read_text().count("store_joined"), 3)
        eventually(lambda: sum(serve(client, tokens) > 0 for tokens in prompts), 20)


def _served(client: Client, tokens: list[int]) -> int:
    """As `serve`, but the cluster may need a moment to notice the loss."""
    num_cached: list[int] = []
    eventually(lambda: num_cached.append(serve(client, tokens)) or 1, 1)  # type: ignore[func-returns-value]
    return num_cached[-1]
