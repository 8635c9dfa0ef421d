"""Seeded chaos on real processes: kills, pauses and drains under load, each answer compared."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.cluster.chaos import SECONDS_PER_SEED, Report, kinds_of, session, table
from tests.cluster.chaos_faults import KINDS


async def run(options: argparse.Namespace, folder: Path) -> list[Report]:
    """Every seed on one cluster."""
    reports = []
    worker = {"engine": "mock"} if options.engine == "mock" else None
    async with session(folder, worker) as chaos:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            report = await chaos.run(seed, kinds_of(options.kinds), options.seconds_per_seed)
            reports.append(report)
            for each in report.broken[:20]:
                print(f"  {each}")
            print(report.line(), flush=True)
            if report.broken:
                print(f"  again: scripts/chaos --first-seed {seed} --kinds {options.kinds}")
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds-per-seed", type=float, default=SECONDS_PER_SEED)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, comma-separated")
    parser.add_argument("--engine", choices=["torch", "mock"], default="torch")
    options = parser.parse_args()
    if unknown := set(options.kinds.split(",")) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="kvbaton-chaos-") as folder:
        reports = asyncio.run(run(options, Path(folder)))
    print("\n".join(table(reports)))
    num_broken = sum(bool(report.broken) for report in reports)
    print(f"{len(reports)} seeds, {sum(r.num_requests for r in reports)} requests, ", end="")
    print(f"{num_broken} seeds fell short")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
