"""Goodput at more load than can be served, beside its peak.

Requests come at random (Poisson), whatever becomes of those before. A request counts if its first
token comes within --ttft and its others within --tpot each, on average. First the capacity is
found by asking without a pause, then goodput at rates around it, then at --times as much; the last
once more with a gateway that refuses nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvbaton import AsyncClient
from kvbaton.errors import KvbatonError
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report
from tests.cluster import proc
from tests.cluster.processes import Cluster, running

_VOCAB_START, _VOCAB = 5, 2048
_SHARES = (0.7, 0.85, 1.0, 1.15)  # of the capacity, where the peak of goodput is looked for
_CLOSED_LOOP = 32  # requests at a time
_UNLIMITED_S = 1e6


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--seconds", type=float, default=60, help="of overload (default: 60)")
    parser.add_argument("--times", type=float, default=3, help="the capacity (default: 3)")
    parser.add_argument("--ttft", type=float, default=2.0, help="target in s (default: 2)")
    parser.add_argument("--tpot", type=float, default=0.1, help="target in s (default: 0.1)")
    parser.add_argument("--max-wait-s", type=float, default=1.0, help="the gateway's (default: 1)")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default: 256)")
    parser.add_argument("--output", type=int, default=32, help="output tokens (default: 32)")
    parser.add_argument("--engine", choices=["torch", "mock"], default="torch")


@dataclass
class Load:
    """What became of the requests of one run."""

    seconds: float = 0.0
    num_asked: int = 0
    num_good: int = 0
    num_finished: int = 0
    ttft: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    refused_after: list[float] = field(default_factory=list)
    num_without_reason: int = 0

    @property
    def goodput(self) -> float:
        """Good requests a second."""
        return self.num_good / self.seconds


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    settings = {each: getattr(options, each) for each in ("engine", "times", "ttft", "tpot")}
    report = Report("overload", {**settings, "tokens": f"{options.prompt} + {options.output}"})
    rows: list[tuple[str, ...]] = []
    peak = capacity = 0.0
    with _cluster(options, options.max_wait_s) as cluster:
        capacity = asyncio.run(_capacity(options, cluster))
        for share in _SHARES:
            load = asyncio.run(_load(options, cluster, share * capacity, options.seconds / 2))
            peak = max(peak, load.goodput)
            rows.append(_row(f"{share:g} of the capacity", share * capacity, load))
        before = _memory(cluster)
        rate = options.times * capacity
        early = asyncio.run(_load(options, cluster, rate, options.seconds / 2))
        between = _memory(cluster)
        late = asyncio.run(_load(options, cluster, rate, options.seconds / 2))
        after = _memory(cluster)
    rows.append(_row(f"{options.times:g} times, first half", rate, early))
    rows.append(_row(f"{options.times:g} times, second half", rate, late))
    with _cluster(options, _UNLIMITED_S) as cluster:
        open_door = asyncio.run(_load(options, cluster, rate, options.seconds / 2))
    rows.append(_row(f"{options.times:g} times, nobody refused", rate, open_door))
    columns = ("load", "asked/s", "good/s", "finished/s", "TTFT, ms", "refused", "other errors")
    report.table(f"capacity {capacity:.1f} requests/s", columns, rows)
    share = (early.num_good + late.num_good) / (early.seconds + late.seconds) / peak
    report.figures |= {"capacity": capacity, "peak_goodput": peak, "share_of_peak": share}
    report.note(f"goodput under overload is {share:.0%} of its peak, {peak:.2f} good requests/s")
    refusals = early.num_without_reason + late.num_without_reason
    report.note(f"refusals without a reason or a time to come again: {refusals}")
    waited = spread([*early.refused_after, *late.refused_after] or [0.0])
    report.note(f"a refusal took {waited.text(1000)} ms")
    for name, start in before.items():
        report.note(
            f"private memory of {name}: {start >> 20} MiB before, {between[name] >> 20} after one "
            f"half, {after[name] >> 20} after both"
        )
    report.figures["memory_bytes"] = [before, between, after]
    return report


@contextmanager
def _cluster(options: argparse.Namespace, max_wait_s: float) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as folder:
        worker = {"engine": options.engine, "max_num_seqs": 16}
        gateway = {"max_wait_s": max_wait_s}
        store = {"kv_bytes": "256M"}
        with running(Path(folder), worker=worker, store=store, gateway=gateway) as cluster:
            yield cluster


def _memory(cluster: Cluster) -> dict[str, int]:
    names = ("gateway.1", "kvstore.1")
    return {name: proc.rss_bytes(cluster.processes[name].pid) for name in names}


def _row(title: str, rate: float, load: Load) -> tuple[str, ...]:
    ttft = spread(load.ttft or [0.0])
    num_refused = load.errors.pop("overloaded", 0)
    return (
        title, f"{rate:.1f}", f"{load.goodput:.2f}", f"{load.num_finished / load.seconds:.2f}",
        ttft.text(1000, 0), f"{num_refused / load.num_asked:.0%}",
        ", ".join(f"{code} {count}" for code, count in load.errors.items()) or "0",
    )  # fmt: skip


async def _capacity(options: argparse.Namespace, cluster: Cluster) -> float:
    """Requests per second when there are always some."""
    load, rng = Load(), random.Random()  # noqa: S311 - prompts
    until = time.perf_counter() + options.seconds / 4
    async with AsyncClient(f"tcp://127.0.0.1:{cluster.client_port}") as client:

        async def ask() -> None:
            while time.perf_counter() < until:
                await _one(client, options, rng, load)

        started_at = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(_CLOSED_LOOP)))
        return load.num_finished / (time.perf_counter() - started_at)


async def _load(options: argparse.Namespace, cluster: Cluster, rate: float, seconds: float) -> Load:
    """Requests at random moments; those under way at the end are waited for."""
    load, rng = Load(seconds=seconds), random.Random()  # noqa: S311 - prompts and moments
    endpoint = f"tcp://127.0.0.1:{cluster.client_port}"
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        started_at = next_at = time.perf_counter()
        while (next_at := next_at + rng.expovariate(rate)) < started_at + seconds:
            await asyncio.sleep(next_at - time.perf_counter())
            group.create_task(_one(client, options, rng, load))
    return load


async def _one(
    client: AsyncClient, options: argparse.Namespace, rng: random.Random, load: Load
) -> None:
    load.num_asked += 1
    prompt = [rng.randrange(_VOCAB_START, _VOCAB) for _ in range(options.prompt)]
    asked_at = time.perf_counter()
    stream = client.generate(
        token_ids=prompt, max_tokens=options.output, temperature=0, ignore_eos=True
    )
    try:
        await anext(stream)
        first_at = time.perf_counter()
        async for _ in stream:
            pass
    except KvbatonError as error:
        load.errors[error.code] += 1
        load.refused_after.append(time.perf_counter() - asked_at)
        load.num_without_reason += not (error.message and error.retry_after_s)
        return
    tpot = (time.perf_counter() - first_at) / (options.output - 1)
    load.num_finished += 1
    load.ttft.append(first_at - asked_at)
    load.num_good += first_at - asked_at <= options.ttft and tpot <= options.tpot
