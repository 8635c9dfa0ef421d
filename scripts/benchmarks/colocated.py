"""How to use all cores of a small machine: colocated or not, one worker per core or one for all.

The same clients ask clusters of different shapes in turn: `--concurrency` requests at a time, every
prompt new. The shapes stand side by side and idle while another is asked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvbaton import AsyncClient
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report
from scripts.make_model import PRESETS, make_model
from tests.cluster.processes import running

_VOCAB_START = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=5, help="of each shape (default: 5)")
    parser.add_argument("--preset", choices=PRESETS, default="135m")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once (default: 4)")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default: 256)")
    parser.add_argument("--output", type=int, default=64, help="output tokens (default: 64)")


def _shapes(num_cores: int) -> dict[str, dict[str, Any]]:
    colocated = {"mode": "colocated", "num_prefill": 0}
    return {
        f"colocated, {num_cores} workers of 1 thread": {**colocated, "num_decode": num_cores},
        f"colocated, 1 worker of {num_cores} threads": {
            **colocated, "num_decode": 1, "worker": {"threads": num_cores},
        },
        "disaggregated, 1 + 1 of 1 thread": {},
    }  # fmt: skip


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    shapes = _shapes(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as name, ExitStack() as stack:
        model = make_model(
            Path(name) / "model", **{**PRESETS[options.preset], "dtype": "bfloat16", "eos": None}
        )
        endpoints = {}
        for number, (title, shape) in enumerate(shapes.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            worker = {"model": model, **shape.get("worker", {})}
            cluster = stack.enter_context(
                running(
                    folder,
                    **{**shape, "worker": worker},
                    store={"kv_bytes": "1G"},
                    gateway={"model": model},
                )
            )
            endpoints[title] = f"tcp://127.0.0.1:{cluster.client_port}"
        return asyncio.run(_measure(options, endpoints))


async def _measure(options: argparse.Namespace, endpoints: dict[str, str]) -> Report:
    found: dict[str, list[tuple[float, list[float], list[float]]]] = {}
    for number in range(options.rounds + 1):
        for title in list(endpoints) if number % 2 else list(endpoints)[::-1]:
            result = await _round(options, endpoints[title])
            if number:
                found.setdefault(title, []).append(result)
    settings = {name: getattr(options, name) for name in ("preset", "concurrency", "rounds")}
    report = Report("colocated", {**settings, "tokens": f"{options.prompt} + {options.output}"})
    rows = []
    for title, results in found.items():
        rate = spread(result[0] for result in results)
        ttft = spread(value for result in results for value in result[1])
        tpot = spread(value for result in results for value in result[2])
        report.figures[title] = {"requests_per_s": rate, "ttft_s": ttft, "tpot_s": tpot}
        rows.append((title, rate.text(digits=2), ttft.text(1000, 0), tpot.text(1000)))
    columns = ("shape", "requests/s", "TTFT, ms", "TPOT, ms")
    report.table("median (p10 to p90)", columns, rows)
    return report


async def _round(
    options: argparse.Namespace, endpoint: str
) -> tuple[float, list[float], list[float]]:
    """Requests per second, and each request's time to first token and time per output token."""
    rng = random.Random()  # noqa: S311 - prompts
    vocab = PRESETS[options.preset].get("vocab", 512)
    ttft, tpot = [], []
    async with AsyncClient(endpoint) as client:

        async def one() -> None:
            prompt = [rng.randrange(_VOCAB_START, vocab) for _ in range(options.prompt)]
            asked_at = time.perf_counter()
            stream = client.generate(token_ids=prompt, max_tokens=options.output, temperature=0)
            await anext(stream)
            first_at = time.perf_counter()
            async for _ in stream:
                pass
            ttft.append(first_at - asked_at)
            tpot.append((time.perf_counter() - first_at) / (options.output - 1))

        started_at = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(options.concurrency)))
        return options.concurrency / (time.perf_counter() - started_at), ttft, tpot
