"""The whole cluster under seeded load and faults: see scenario.py, and docs/simulation.md."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim.scenario import NUM_FAULTS, NUM_REQUESTS, draw, run_seed

pytestmark = pytest.mark.usefixtures("quiet")

NUM_SEEDS, NUM_SEEDS_LONG = 300, 1000


def check(seed: int) -> None:
    report = run_seed(seed)
    again = f"seed {seed} broke: {report.broken}. To see it: scripts/sim --seed {seed}"
    assert report.broken == [], again
    assert report.num_requests == report.outcomes.total() >= NUM_REQUESTS, again
    assert report.struck.total() >= NUM_FAULTS, again


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_request_is_answered_or_refused_and_nothing_is_left(seed: int) -> None:
    check(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(NUM_SEEDS, NUM_SEEDS_LONG))
def test_more_seeds_leave_nothing_either(seed: int) -> None:
    check(seed)


def test_blocks_go_to_disks_and_come_back() -> None:
    seeds = [seed for seed in range(30) if draw(seed).shape.disk_bytes]
    assert sum(run_seed(seed).num_loaded for seed in seeds[:8]) > 0


@pytest.mark.parametrize("options", [["--seed", "5"], ["--seed", "15", "--count", "4"]])
def test_a_seed_prints_the_same_bytes_in_every_process(options: list[str]) -> None:
    def output(hash_seed: str) -> bytes:
        ended = subprocess.run(
            [sys.executable, "-m", "scripts.simulate", *options],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=False,
        )
        return ended.stdout

    first = output("1")
    assert b"trace" in first.splitlines()[-1]
    assert output("2") == output("random") == first
