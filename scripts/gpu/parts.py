"""A part of the check: a process of its own, so that what fails or hangs takes nothing with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.cluster.identity import ROOT

_LAST_WORDS = 1500


@dataclass(frozen=True)
class Line:
    """One line of the table: what was found, what it is held against, and whether that is well.
    `is_well` None: it is only told."""

    name: str
    found: str
    limit: str = ""
    is_well: bool | None = None


@dataclass
class Result:
    """What a part found; `failure` is why it did not come to its end."""

    part: str
    lines: list[Line] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def is_well(self) -> bool:
        return not self.failure and all(line.is_well is not False for line in self.lines)

    def check(self, name: str, found: float, most: float, unit: str = "") -> None:
        """A figure that must not be above `most`."""
        self.figures[name] = found
        self.lines.append(Line(name, f"{found:.3g}{unit}", f"at most {most:g}", found <= most))

    def agree(self, name: str, ours: Sequence[Any], theirs: Sequence[Any], least: int) -> None:
        """At least so many must be equal."""
        num_equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
        self.figures[name] = {"equal": num_equal, "of": len(ours)}
        limit = f"at least {least}"
        found = f"{num_equal} of {len(ours)} equal"
        self.lines.append(Line(name, found, limit, num_equal >= least))

    def aim(self, name: str, found: float, least: float) -> None:
        """A share that should be reached; to miss it is told, and is no failure."""
        self.figures[name] = found
        verdict = "reached" if found >= least else "missed"
        self.lines.append(Line(name, f"{found:.0%}, {verdict}", f"aim {least:.0%}"))

    def tell(self, name: str, text: str, **figures: float) -> None:
        """Figures to know."""
        self.figures[name] = figures
        self.lines.append(Line(name, text))

    def save(self, path: Path) -> None:
        """For the process that started this one."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def run_part(part: str, device: str, timeout_s: float) -> Result:
    """Run `python -m scripts.gpu.PART OUT DEVICE`; what it printed is told only if it failed."""
    with tempfile.TemporaryDirectory(prefix="kvbaton-gpu-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"scripts.gpu.{part}", str(out), device]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=timeout_s, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(part, failure=f"not done after {timeout_s:.0f} s")
        if done.returncode != 0 or not out.exists():
            said = (done.stdout + done.stderr)[-_LAST_WORDS:]
            return Result(part, failure=f"ended with status {done.returncode}: {said}")
        content = json.loads(out.read_text(encoding="utf-8"))
    lines = [Line(**line) for line in content.pop("lines")]
    return Result(**content, lines=lines)
