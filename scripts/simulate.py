"""Replays seeds of the simulated cluster. Prints no wall-clock time: two runs are equal."""

from __future__ import annotations

import argparse
import logging
from collections import Counter, defaultdict

import structlog

from tests.sim.recovery import percentiles
from tests.sim.scenario import MODES, Report, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--mode", choices=MODES, default="safety")
    parser.add_argument("--seed", type=int, required=True, help="the first seed")
    parser.add_argument(
        "--count", type=int, help="run so many seeds, one line each, then a summary"
    )
    options = parser.parse_args()
    # What services log carries wall-clock time; what matters here is in the report.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    summary = Summary()
    for seed in range(options.seed, options.seed + (options.count or 1)):
        report = run_seed(seed, options.mode)
        if options.count is None:
            print(f"{report.shape}\n" + "\n".join(report.events))
        summary.add(report)
        lines = [*(f"BROKEN: {each}" for each in report.broken[1:]), report.line()]
        print("\n".join(lines), flush=True)
    if options.count is not None:
        print("\n".join(summary.lines()))
    return 1 if summary.num_broken else 0


class Summary:
    """What many seeds came to."""

    def __init__(self) -> None:
        self.num_broken = 0
        self._outcomes: Counter[str] = Counter()
        self._struck: Counter[str] = Counter()
        self._states: Counter[str] = Counter()
        self._pairs: set[tuple[str, str, str]] = set()
        self._num_pairs = self._num_resumed = 0
        self._done_after_s = 0.0
        self._times_s: dict[str, list[float]] = defaultdict(list)

    def add(self, report: Report) -> None:
        """One more seed."""
        self.num_broken += bool(report.broken)
        self._outcomes += report.outcomes
        self._struck += report.struck
        self._states += report.recoveries.states
        self._pairs |= set(report.pairs)
        self._num_pairs += report.pairs.total()
        self._num_resumed += report.num_resumed
        self._done_after_s = max(self._done_after_s, report.done_after_s)
        for kind, times_s in report.recoveries.times_s.items():
            self._times_s[kind] += times_s

    def lines(self) -> list[str]:
        """For people. A kind that is `second` came during recovery from another."""
        rows = [f"{'recovery, virtual s':24}{'requests':>9}{'p50':>8}{'p99':>8}{'max':>8}"]
        for kind, times_s in sorted(self._times_s.items()):
            p50, p99, most = percentiles(times_s)
            rows.append(f"{kind:24}{len(times_s):9}{p50:8.3f}{p99:8.3f}{most:8.3f}")
        return [
            f"requests: {_counts(self._outcomes)}; {self._num_resumed} resumed elsewhere",
            f"faults struck: {_counts(self._struck)}",
            f"pairs: {self._num_pairs}, of {len(self._pairs)} kinds",
            f"handoffs hit: {_counts(self._states)}",
            f"all done within {self._done_after_s:.3f} s of the last fault",
            *rows,
            f"broken seeds: {self.num_broken}",
        ]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


if __name__ == "__main__":
    raise SystemExit(main())
