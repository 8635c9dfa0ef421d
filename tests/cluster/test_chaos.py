"""Real processes with the demo model under kills, pauses and drains: see docs/chaos.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.chaos import kinds_of, session, table
from tests.cluster.chaos_faults import COUNTS, KINDS

NUM_SEEDS = 10
SECONDS = 2.0  # of load, for each seed


@pytest.mark.timeout(240)
async def test_ten_seeds_of_faults_and_no_request_notices(tmp_path: Path) -> None:
    async with session(tmp_path) as chaos:
        kinds = kinds_of(",".join(KINDS))
        reports = [await chaos.run(seed, kinds, SECONDS) for seed in range(NUM_SEEDS)]
    print("\n".join([*(report.line() for report in reports), *table(reports)]))  # noqa: T201
    assert [line for report in reports for line in report.broken] == []
    assert all(report.strikes for report in reports)
    assert len({str(strike.kind) for report in reports for strike in report.strikes}) >= 5
    assert sum(map(len, (v for r in reports for v in r.recoveries.values()))) > 20


@pytest.mark.timeout(120)
async def test_every_process_is_replaced_in_turn_under_load(tmp_path: Path) -> None:
    """An upgrade without a maintenance window: not one error, and the same answers."""
    names = [f"{role}.{number + 1}" for role, count in COUNTS.items() for number in range(count)]
    async with session(tmp_path) as chaos:
        report = await chaos.replace_all(names, pause_s=0.2)
    assert report.broken == []
    assert [strike.name for strike in report.strikes] == names
    assert report.num_requests > 50
