"""The whole cluster under seeded load and faults: see scenario.py, and docs/simulation.md."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from common.worker import runtime
from tests.sim.farm import asked_for, farmed
from tests.sim.faults import DISK_FAULTS, LINK_FAULTS, PROCESS_FAULTS
from tests.sim.recovery import UNOPENED
from tests.sim.scenario import MODES, NUM_FAULTS, NUM_REQUESTS, Report, draw, run_seed

pytestmark = pytest.mark.usefixtures("quiet")

NUM_SEEDS, NUM_SEEDS_LONG = 110, 2000  # of each mode
STATES = {UNOPENED, "waiting", "reserved", "filling", "sealed", "claimed", "aborting", "held"}


class Tally:
    """What the seeds of the test run met together."""

    def __init__(self) -> None:
        self.num_seeds = 0
        self.struck: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str, str]] = Counter()
        self.states: Counter[str] = Counter()
        self.num_resumed = 0
        self.kinds_recovered: set[str] = set()

    def add(self, report: Report) -> None:
        self.num_seeds += 1
        self.struck += report.struck
        self.pairs += report.pairs
        self.states += report.recoveries.states
        self.num_resumed += report.num_resumed
        self.kinds_recovered |= {kind.split()[0] for kind in report.recoveries.times_s}


TALLY = Tally()


@pytest.fixture(scope="module")
def report_of(request: pytest.FixtureRequest) -> Iterator[Callable[[int, str], Report]]:
    with farmed(run_seed, asked_for(request, "report_of", "seed", "mode")) as report_of:
        yield report_of


def check(report: Report) -> Report:
    seed, mode = report.seed, report.mode
    again = f"broke: {report.broken}. To see it: scripts/sim --mode {mode} --seed {seed}"
    assert report.broken == [], again
    assert report.num_requests == report.outcomes.total() >= NUM_REQUESTS, again
    assert report.struck.total() >= NUM_FAULTS, again
    return report


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_nothing_is_wrong_or_left_and_what_must_finish_does(
    seed: int, mode: str, report_of: Callable[[int, str], Report]
) -> None:
    TALLY.add(check(report_of(seed, mode)))


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(NUM_SEEDS, NUM_SEEDS_LONG))
def test_nothing_is_wrong_or_left_with_more_seeds(
    seed: int, mode: str, report_of: Callable[[int, str], Report]
) -> None:
    check(report_of(seed, mode))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_wrong_where_each_block_of_a_chunk_is_committed_by_itself(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "MESSAGE_BYTES", 1)
    check(run_seed(seed))


def test_the_seeds_met_every_fault_many_pairs_and_every_state_of_a_handoff() -> None:
    if TALLY.num_seeds < NUM_SEEDS * len(MODES):
        pytest.skip("only some of the seeds were run")
    assert set(TALLY.struck) == {*PROCESS_FAULTS, *LINK_FAULTS, *DISK_FAULTS}
    assert min(TALLY.struck.values()) >= 3
    assert TALLY.kinds_recovered == set(PROCESS_FAULTS)
    assert set(TALLY.states) >= STATES
    kinds = {(first, second) for first, second, _ in TALLY.pairs}
    assert len(kinds) >= 120
    of_processes = {pair for pair in kinds if set(pair) <= set(PROCESS_FAULTS)}
    assert len(of_processes) >= 50
    aims = Counter(dict.fromkeys(("same", "peer", "any"), 0))
    for (_, _, aim), count in TALLY.pairs.items():
        aims[aim] += count
    assert min(aims.values()) >= 20
    assert TALLY.num_resumed >= 100


def test_blocks_go_to_disks_and_come_back() -> None:
    seeds = [seed for seed in range(30) if draw(seed, "safety").shape.disk_bytes]
    assert sum(run_seed(seed).num_loaded for seed in seeds[:8]) > 0


@pytest.mark.parametrize(
    "options", [["--seed", "5"], ["--mode", "liveness", "--seed", "15", "--count", "3"]]
)
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
    assert b"trace" in first
    assert output("2") == output("random") == first
