"""Replays seeds of the simulated cluster. Prints no wall-clock time: two runs are equal."""

from __future__ import annotations

import argparse
import logging

import structlog

from tests.sim.scenario import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="the first seed")
    parser.add_argument("--count", type=int, help="run so many seeds, one line each")
    options = parser.parse_args()
    # What services log carries wall-clock time; what matters here is in the report.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    num_broken = 0
    for seed in range(options.seed, options.seed + (options.count or 1)):
        report = run_seed(seed)
        if options.count is None:
            print(f"{report.shape}\n" + "\n".join(report.events))
        num_broken += bool(report.broken)
        print("\n".join([*(f"BROKEN: {each}" for each in report.broken[1:]), report.line()]))
    return 1 if num_broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
