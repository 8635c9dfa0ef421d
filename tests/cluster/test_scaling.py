"""Throughput grows with the number of processes while cores are not the limit.

The mock engine sleeps in its steps, so that 32 workers fit on two cores: what is measured is that
nothing in the path between them is serial.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from common.engine.mock import mock_output
from kvbaton import AsyncClient
from tests.cluster.processes import Cluster, running

FEW_SIZES, SIZES = (1, 4, 16), (1, 2, 4, 8, 16)
SEQUENCES_A_WORKER = 4
NUM_TOKENS = 24
ROUNDS = 2
# Slow steps: what the processes need of the cores, and the burst at the start of each round, must
# stay small beside what they sleep, on a slow machine too.
WORKER = {"engine": "mock", "mock_step_ms": 250, "mock_token_ms": 0, "max_num_seqs": 4}


async def requests_per_s(cluster: Cluster, size: int) -> float:
    """Closed loop: each worker is kept full, so a round takes as long as its steps."""
    prompts = [[5 + index, 6, 7] for index in range(size * SEQUENCES_A_WORKER)]
    async with AsyncClient(f"tcp://127.0.0.1:{cluster.client_port}") as client:

        async def one(prompt: list[int]) -> None:
            for _ in range(ROUNDS):
                stream = client.generate(token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0)
                output = [token.token_id async for token in stream]
                assert output == mock_output(prompt, NUM_TOKENS)

        started_at = time.monotonic()
        await asyncio.gather(*(one(prompt) for prompt in prompts))
        return len(prompts) * ROUNDS / (time.monotonic() - started_at)


@pytest.mark.parametrize(
    "sizes", [FEW_SIZES, pytest.param(SIZES, marks=pytest.mark.long)], ids=["few", "all"]
)
def test_throughput_grows_with_the_number_of_workers(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    rates = {}
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        with running(folder, num_prefill=size, num_decode=size, worker=WORKER) as cluster:
            rates[size] = asyncio.run(requests_per_s(cluster, size))
    shares = {size: rates[size] / (rates[1] * size) for size in sizes}
    assert all(share >= 0.9 for share in shares.values()), shares
