"""Runs loads in the generator's process and adds up what it tells."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from scripts.benchmarks.attainment import Outcome, Targets, attainment
from scripts.benchmarks.load_generator import Burst, End, LoadSpec
from scripts.benchmarks.measure import on_cores
from scripts.benchmarks.progress import progress
from tests.cluster.processes import ROOT, cpu_seconds

_LINES = msgspec.json.Decoder(Outcome | Burst | End)
_PERCENTILES = (50, 90, 99)


@dataclass
class Load:
    """One load and what became of it. Shares are of one core; `pids` of the server, by name."""

    title: str
    spec: LoadSpec
    outcomes: list[Outcome] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    generator_share: float = 0.0
    server_shares: dict[str, float] = field(default_factory=dict)
    is_lost: bool = False

    @property
    def finished(self) -> list[Outcome]:
        """The requests that were answered."""
        return [each for each in self.outcomes if not each.error]

    def percentiles(self, name: str) -> tuple[float, ...]:
        """The median, 90th and 99th percentile of one of an outcome's times; 0 without any."""
        values = [getattr(each, name) for each in self.finished] or [0.0]
        return tuple(map(float, np.percentile(values, _PERCENTILES)))

    def attainment(self, targets: Targets) -> float:
        """See attainment.py."""
        return attainment(self.outcomes, self.spec.count, targets)

    def meets(self, targets: Targets) -> bool:
        """Whether enough requests met them."""
        return self.attainment(targets) >= targets.share - 1e-9

    def figures(self, targets: Targets | None) -> dict[str, Any]:
        """All there is to write down."""
        names = ("ttft_s", "tpot_s", "worst_gap_s", "e2e_s", "late_s")
        finished = self.finished
        return {
            "title": self.title,
            "mix": self.spec.mix,
            "rate": self.spec.rate,
            "clients": self.spec.clients,
            "asked": self.spec.count,
            "finished": len(finished),
            "ended_early": self.is_lost,
            "seconds": self.seconds,
            "requests_per_s": len(finished) / self.seconds,
            "tokens_per_s": sum(each.num_tokens for each in finished) / self.seconds,
            "p50_p90_p99": {name: self.percentiles(name) for name in names},
            "step_s": float(np.median(self.steps_s)) if self.steps_s else None,
            "attainment": None if targets is None else self.attainment(targets),
            "generator_share": self.generator_share,
            "server_shares": self.server_shares,
            "errors": sorted({each.error for each in self.outcomes if each.error}),
            "outcomes": [msgspec.to_builtins(each) for each in self.outcomes],
        }


def run_load(
    title: str, spec: LoadSpec, pids: Mapping[str, int], cores: list[int] | None = None
) -> Load:
    """Run it. `pids`: processes of the server; `cores`: those that the generator may use.

    Raises RuntimeError if the generator fails.
    """
    load = Load(title, spec)
    ours, theirs = time.process_time(), {name: cpu_seconds([pid]) for name, pid in pids.items()}
    command = [sys.executable, "-m", "scripts.benchmarks.load_generator"]
    with on_cores(cores):
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    end: End | None = None
    with process, progress(title, spec.count) as advance:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        for line in process.stdout:
            match _LINES.decode(line):
                case Outcome() as outcome:
                    load.outcomes.append(outcome)
                    advance()
                case Burst(step_s):
                    load.steps_s.append(step_s)
                case End() as end:
                    pass
    if end is None or process.returncode:
        raise RuntimeError(f"{title}: the load generator failed with status {process.returncode}")
    load.seconds, load.is_lost = end.seconds, end.is_lost
    load.generator_share = (end.cpu_s + time.process_time() - ours) / end.seconds
    load.server_shares = {
        name: (cpu_seconds([pid]) - theirs[name]) / end.seconds for name, pid in pids.items()
    }
    return load
