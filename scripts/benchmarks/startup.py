"""From `scripts/serve` to its cluster's first answer, phase by phase, and the memory that it holds.

The cluster is one of each service, as a user starts it; the model's file was read before. A phase
ends when the worker logs that it does. Memory is the kernel's account of each process
(smaps_rollup): resident, proportional (a page that n processes map counts a n-th), and private.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchmarks import engines
from scripts.benchmarks.measure import Spread, spread
from scripts.benchmarks.progress import progress
from scripts.benchmarks.report import Report
from scripts.cluster.processes import descendants
from scripts.make_model import PRESETS
from tests.cluster.processes import cpu_seconds
from tests.ports import free_port

_SERVE = [str(engines.ROOT / "scripts" / "serve")]
_STOP_S = 20.0
_READY = "ready after "
_LAUNCHER = "launcher"  # scripts/serve, honcho and the keepers
# What a worker logs at the end of each phase of its start.
_ENDS = {
    "imports": "torch imported",
    "read and pack": "weights packed",
    "tokenizer": "model loaded",
    "self test": "self test passed",
    "join": "worker ready",
}
_LAUNCH = "launch"
_LINE = re.compile(r"\d\d:\d\d:\d\d (\w+)\.\d+ +(.*)")
_KINDS = {
    "resident": ("Rss",),
    "proportional": ("Pss",),
    "private": ("Private_Clean", "Private_Dirty"),
}


@dataclass
class Start:
    """One start, in seconds from its command on. `marks`: when each event was logged, by role.
    `memory`: bytes by role and kind. `cpu_s`: of processor time, by role."""

    began_s: dict[str, float] = field(default_factory=dict)
    marks: dict[str, dict[str, float]] = field(default_factory=dict)
    ready_s: float = 0.0
    answered_s: float = 0.0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)

    def phases(self, role: str) -> dict[str, float]:
        """How long each phase of a worker took."""
        found = {_LAUNCH: self.began_s[role]}
        last = self.began_s[role]
        for phase, event in _ENDS.items():
            if event in self.marks[role]:  # torch packs nothing of its own
                found[phase] = self.marks[role][event] - last
                last = self.marks[role][event]
        return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    add(
        "--preset", choices=PRESETS, help="a made bf16 model of this size (default: the demo model)"
    )
    add("--model", type=Path, metavar="FOLDER", help="this model")
    add("--runs", type=int, default=3, help="starts, one after another (default: 3)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    if options.preset is None and options.model is None:
        options.model = engines.DEMO
    with engines.model_folder(options) as model, progress("startup", options.runs) as advance:
        starts = []
        for _ in range(options.runs):
            starts.append(measure(model))
            advance()
    return _report(engines.name_of(options), starts)


def measure(model: Path) -> Start:
    """Start a cluster, have it answer, and end it. Raises RuntimeError if it does not come up."""
    port = free_port()
    flags = ["--verbose", "--no-sample", "--model", str(model), "--http-port", str(port)]
    start = Start()
    begun, begun_since_boot = time.perf_counter(), time.clock_gettime(time.CLOCK_BOOTTIME)
    with _running([*_SERVE, *flags]) as process:
        assert process.stdout is not None
        read_marks(process.stdout, start, lambda: time.perf_counter() - begun)
        _ask(port)
        start.answered_s = time.perf_counter() - begun
        for pid in (process.pid, *(info.pid for info in descendants(process.pid))):
            role = _role(pid)
            start.began_s.setdefault(role, _started(pid) - begun_since_boot)
            start.cpu_s[role] = start.cpu_s.get(role, 0.0) + cpu_seconds([pid])
            add_memory(start, role, Path(f"/proc/{pid}/smaps_rollup").read_text())
    return start


def read_marks(lines: Iterable[str], start: Start, now_s: Callable[[], float]) -> None:
    """Note when each event is logged, until all is ready. Raises RuntimeError if that never is."""
    said = []
    for line in lines:
        said.append(line)
        if line.startswith(_READY):
            start.ready_s = now_s()
            return
        if found := _LINE.match(line):
            role, text = found.groups()
            for event in filter(text.startswith, _ENDS.values()):
                start.marks.setdefault(role, {})[event] = now_s()
    raise RuntimeError(f"the cluster did not come up:\n{''.join(said[-20:])}")


def add_memory(start: Start, role: str, rollup: str) -> None:
    """Add what the text of a smaps_rollup says to the memory of a role."""
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    kept = start.memory.setdefault(role, dict.fromkeys(_KINDS, 0))
    for kind, names in _KINDS.items():
        kept[kind] += sum(int(sizes[name]) for name in names) * 1024


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environ()
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=_STOP_S)


def _environ() -> Mapping[str, str]:
    """Without PYTHONPATH, which scripts/bench has set for itself."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _ask(port: int) -> None:
    """Wait for the answer to a request of one token. Raises OSError if there is none."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"prompt": "def", "max_tokens": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_STOP_S) as answer:  # noqa: S310
        answer.read()


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    named = [word.removeprefix("services.") for word in words if word.startswith("services.")]
    return named[0] if named else _LAUNCHER


def _started(pid: int) -> float:
    """In seconds since the machine was started: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _report(model: str, starts: list[Start]) -> Report:
    report = Report("startup", {"model": model, "runs": len(starts)})
    ready = spread(start.ready_s for start in starts)
    answered = spread(start.answered_s for start in starts)
    workers = sorted(starts[0].marks)
    phases: dict[str, dict[str, Spread]] = {
        phase: {role: spread(start.phases(role)[phase] for start in starts) for role in workers}
        for phase in starts[0].phases(workers[0])
    }
    memory: dict[str, dict[str, Spread]] = {
        role: {kind: spread(start.memory[role][kind] for start in starts) for kind in _KINDS}
        for role in sorted(starts[0].memory)
    }
    cpu = {role: spread(start.cpu_s[role] for start in starts) for role in memory}
    report.figures |= {"ready_s": ready, "answered_s": answered, "phases_s": phases}
    report.figures |= {"cpu_s": cpu, "memory_bytes": memory}
    report.table(
        "Seconds of each worker's start, one phase after another",
        ("phase", *workers),
        [(name, *(each.text(digits=2) for each in row.values())) for name, row in phases.items()],
    )
    report.table(
        "Up to the first answer: seconds of processor time, and MiB of memory then",
        ("process", "cpu", *_KINDS),
        [
            (role, cpu[role].text(digits=2), *(each.text(2**-20, 0) for each in row.values()))
            for role, row in memory.items()
        ],
    )
    report.note(f"ready after {ready.text(digits=2)} s, first answer {answered.text(digits=2)} s")
    return report
