"""Runs loads in the generator's process and adds up what it tells."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from scripts.benchmarks.attainment import Outcome, Targets, attainment
from scripts.benchmarks.load_generator import Burst, End, LoadSpec
from scripts.benchmarks.measure import cpu_seconds_of_all, on_cores
from scripts.benchmarks.progress import progress
from scripts.benchmarks.servers import Server
from tests.cluster.processes import ROOT, cpu_seconds

_LINES = msgspec.json.Decoder(Outcome | Burst | End)
_PERCENTILES = (50, 90, 99)


@dataclass
class Load:
    """One load and what became of it. Shares are of one core, those of the server's processes by
    name. `others_share`: of all else that ran, None where the server's are not known.

    `overheads`: of the time in which a worker had steps to run, the share in which its model did
    not compute; None where it had none, or does not tell.
    """

    title: str
    spec: LoadSpec
    outcomes: list[Outcome] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    generator_share: float = 0.0
    server_shares: dict[str, float] = field(default_factory=dict)
    others_share: float | None = None
    overheads: dict[str, float | None] = field(default_factory=dict)
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

    @property
    def control_share(self) -> float | None:
        """Of a core, that gateway and store together take for 100 tokens a second; None for servers
        that have neither."""
        names = [name for name in self.server_shares if name.startswith(("gateway", "kvstore"))]
        num_tokens = sum(each.num_tokens for each in self.finished)
        if not names or not num_tokens:
            return None
        return sum(self.server_shares[name] for name in names) * self.seconds * 100 / num_tokens

    def line(self, targets: Targets | None) -> str:
        """The most important in a line."""
        ttft_s, tpot_s = self.percentiles("ttft_s")[0], self.percentiles("tpot_s")[0]
        finished = len(self.finished)
        within = "" if targets is None else f", {self.attainment(targets):.0%} within targets"
        return (
            f"{self.title}: {finished} of {self.spec.count}, {finished / self.seconds:.2f} a "
            f"second, TTFT {ttft_s * 1000:.0f} ms, TPOT {tpot_s * 1000:.1f} ms{within}"
        )

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
            "others_share": self.others_share,
            "gateway_and_store_at_100_tokens_per_s": self.control_share,
            "overheads": self.overheads,
            "errors": sorted({each.error for each in self.outcomes if each.error}),
            "outcomes": [msgspec.to_builtins(each) for each in self.outcomes],
        }


def run_load(title: str, spec: LoadSpec, server: Server, cores: list[int] | None = None) -> Load:
    """Run it. `cores`: those that the generator may use.

    Raises RuntimeError if the generator fails.
    """
    load = Load(title, spec)
    before = Used(server)
    end = _generate(load, cores)
    load.seconds, load.is_lost = end.seconds, end.is_lost
    before.add_since(load, server, end)
    return load


def _generate(load: Load, cores: list[int] | None) -> End:
    command = [sys.executable, "-m", "scripts.benchmarks.load_generator"]
    with on_cores(cores):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for us: we end it
        )
    end: End | None = None
    with process, progress(load.title, load.spec.count) as advance:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(load.spec))
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
        except BaseException:
            process.kill()  # or we would wait until it has asked for all
            raise
    if end is None or process.returncode:
        raise RuntimeError(
            f"{load.title}: the load generator failed with status {process.returncode}"
        )
    return end


class Used:
    """CPU time that was used before a load, and what workers had done."""

    def __init__(self, server: Server) -> None:
        self._all_s = cpu_seconds_of_all()
        self._ours_s = time.process_time()
        self._servers_s = {name: cpu_seconds([pid]) for name, pid in server.pids.items()}
        self._busy = server.busy()

    def add_since(self, load: Load, server: Server, end: End) -> None:
        """Note the shares of what was used since."""
        ours_s = end.cpu_s + time.process_time() - self._ours_s
        load.generator_share = ours_s / end.seconds
        load.server_shares = {
            name: (cpu_seconds([pid]) - self._servers_s[name]) / end.seconds
            for name, pid in server.pids.items()
        }
        if server.pids:
            all_share = (cpu_seconds_of_all() - self._all_s) / end.seconds
            known = load.generator_share + sum(load.server_shares.values())
            load.others_share = max(0.0, all_share - known)
        for name, busy in server.busy().items():
            steps_s = busy.steps_s - self._busy[name].steps_s
            arithmetic_s = busy.arithmetic_s - self._busy[name].arithmetic_s
            load.overheads[name] = 1 - arithmetic_s / steps_s if arithmetic_s else None
