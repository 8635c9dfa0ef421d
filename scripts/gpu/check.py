"""Runs the parts one after another within a limit of time, prints a table and writes JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from scripts.cluster.identity import ROOT
from scripts.gpu import wheels
from scripts.gpu.parts import Result, run_part

PARTS = ("parity", "speed", "pair")
LIMIT_S = 460.0  # of all parts together
_ON_THE_CPU = tuple(
    f"tests/unit/test_{name}.py"
    for name in (
        "attention",
        "residency",
        "device_memory",
        "neighbours",
        "cuda_ipc",
        "decode_graphs",
        "engine_device",
    )
)


def main() -> int:
    """Returns the exit status: 0 if all is well, or there was nothing to check."""
    options = parse_options()
    if options.download:
        wheels.download(options.download, options.python_version)
        return 0
    if options.wheels:
        wheels.run_again_with(options.wheels)
    try:
        return check(options)
    finally:
        shutil.rmtree(wheels.unpacked(), ignore_errors=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check.json"), help="JSON (default: gpu_check.json)")
    add("--wheels", type=Path, metavar="FOLDER", help="use the packages in these wheels")
    add("--download", type=Path, metavar="FOLDER", help="only fetch such wheels, with a network")
    add("--python-version", default="3.12", help="of the machine with the GPU (default: 3.12)")
    add("--part", choices=PARTS, action="append", help="only this part, which may be repeated")
    add("--rehearse", action="store_true", help="run the parts on the CPU, with a small model")
    return parser.parse_args()


def check(options: argparse.Namespace) -> int:
    """Everything, on the GPU if there is one."""
    if not torch.cuda.is_available() and not options.rehearse:
        print("no GPU here: running what works on the CPU, which says nothing of CUDA's kernels")
        return run_unit_tests()
    device = "cpu" if options.rehearse else "cuda"
    until = time.monotonic() + LIMIT_S
    results = []
    for part in options.part or PARTS:
        print(f"{part} ...", flush=True)
        results.append(run_part(part, device, max(1.0, until - time.monotonic())))
    settings = machine(device)
    show(settings, results)
    content = {"settings": settings, "parts": [asdict(result) for result in results]}
    options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result.is_well for result in results) else 1


def run_unit_tests() -> int:
    """Plans of attention, decisions on residency, copies, sizes of graphs."""
    if importlib.util.find_spec("pytest_asyncio") is None:
        print("the tests need the development packages: scripts/setup dev")
        return 0
    command = [sys.executable, "-m", "pytest", "-q", *_ON_THE_CPU]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
        found["cuda"] = torch.version.cuda
    return found


def show(settings: dict[str, Any], results: list[Result]) -> None:
    """One table, and why parts failed."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim")
    table = Table(title="GPU check", title_justify="left")
    for column in ("part", "what", "found", "limit", ""):
        table.add_column(column)
    verdicts = {True: "ok", False: "FAILED", None: ""}
    for result in results:
        for line in result.lines:
            table.add_row(result.part, line.name, line.found, line.limit, verdicts[line.is_well])
        if result.failure:
            table.add_row(result.part, "the part itself", "", "", "FAILED")
    console.print(table)
    for result in results:
        if result.failure:
            console.print(f"{result.part} {result.failure}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
