"""What the gateway itself costs: latency and CPU time of a request and of a token, streamed.

Beside it, in the same rounds, a bare starlette server on uvicorn that streams constants. kvbaton's
cluster has mock engines, one process of each role; the gateway and the bare server each have a core
of their own, all the rest shares another. Then 10,000 streams that stand still beside 100 that run,
at the gateway's HTTP face.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scripts.benchmarks.bare_http import IDLE
from scripts.benchmarks.http_streams import Reader, Streamed, request_bytes, streams
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report
from tests.cluster import proc
from tests.cluster.processes import ROOT, Cluster, cpu_seconds, running
from tests.ports import free_port

_PROMPT_TOKENS = 32
_STEP_MS = 5.0  # of mock engines, and between the constants, where latency is measured
_OPENING = 100  # idle streams at a time
_FAR_AWAY_S = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    parser.add_argument("--rounds", type=int, default=3, help="of each server (default: 3)")
    parser.add_argument("--seconds", type=float, default=5, help="of each load (default: 5)")
    parser.add_argument("--clients", type=int, default=32, help="at full load (default: 32)")
    parser.add_argument("--idle", type=int, default=10_000, help="streams that stand still")
    parser.add_argument("--active", type=int, default=100, help="streams beside them")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    settings = {each: getattr(options, each) for each in ("rounds", "seconds", "clients")}
    report = Report("gateway", settings)
    _latency(report, options, cores[0])
    _throughput(report, options, cores[0])
    _idle(report, options, cores[0])
    return report


def _latency(report: Report, options: argparse.Namespace, core: int) -> None:
    """One stream at a time, at a pace that disturbs nobody."""
    found: dict[str, list[Streamed]] = {"kvbaton": [], "bare": []}
    with _cluster(core, _STEP_MS) as cluster, _server("starlette", core, _STEP_MS) as bare:
        ports = {"kvbaton": cluster.http_port, "bare": bare[0]}
        for _ in range(options.rounds):
            for name, port in ports.items():
                found[name] += asyncio.run(streams(port, _prompts(1), 64, options.seconds))
    rows = []
    for name, read in found.items():
        ttft = np.percentile([each.ttft for each in read], (50, 99)) * 1000
        gaps = np.percentile([gap for each in read for gap in each.gaps], (50, 99)) * 1000
        cells = (*ttft, *(gaps - _STEP_MS))
        report.figures[f"latency_ms_{name}"] = list(map(float, cells))
        rows.append((name, *(f"{value:.2f}" for value in cells), str(len(read))))
    columns = ("server", "TTFT p50, ms", "p99", "gap less 5 ms, p50", "p99", "streams")
    report.table("one stream at a time, 64 tokens, a step of 5 ms", columns, rows)


def _throughput(report: Report, options: argparse.Namespace, core: int) -> None:
    """As many streams as a server takes."""
    rows = []
    with _cluster(core, 0.0) as cluster, _server("starlette", core, 0.0) as bare:
        servers = {
            "kvbaton": (cluster.http_port, cluster.processes["gateway.1"].pid),
            "bare": bare,
        }
        for num_tokens in (1, 256):
            loads: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name, (port, pid) in servers.items():
                    loads[name].append(_load(options, port, pid, num_tokens))
            for name, load in loads.items():
                rate = spread(each[0] for each in load)
                cost = spread(each[1] / num_tokens for each in load)
                report.figures[f"load_{name}_{num_tokens}"] = [rate, cost]
                rows.append((
                    f"{name}, {num_tokens} a stream", rate.text(digits=0),
                    f"{rate.median * num_tokens:.0f}", cost.text(1e6, 0),
                    f"{1 / cost.median:.0f}",
                ))  # fmt: skip
    columns = ("server, tokens", "streams/s", "tokens/s", "CPU of a token, us", "a core's tokens/s")
    report.table(f"{options.clients} streams at a time, no pause between tokens", columns, rows)


def _load(options: argparse.Namespace, port: int, pid: int, num_tokens: int) -> tuple[float, float]:
    """Streams a second, and seconds of the server's CPU for each."""
    begun, cpu = time.perf_counter(), cpu_seconds([pid])
    read = asyncio.run(streams(port, _prompts(options.clients), num_tokens, options.seconds))
    assert all(each.num_tokens == num_tokens for each in read)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds([pid]) - cpu
    return len(read) / seconds, cpu / len(read)


def _idle(report: Report, options: argparse.Namespace, core: int) -> None:
    """Active streams alone, then beside those that stand still."""
    rows = []
    with _server("face", core, 50.0) as (port, pid):
        prompts = _prompts(options.active)
        asyncio.run(streams(port, prompts, 20, 1))
        for num_idle in (0, options.idle):
            before = proc.rss_bytes(pid)
            read, cpu, memory = asyncio.run(_beside(port, pid, num_idle, prompts, options.seconds))
            gaps = np.percentile([gap for each in read for gap in each.gaps], (50, 99)) * 1000
            kib = (memory - before) / 1024 / max(1, num_idle)
            report.figures[f"idle_{num_idle}"] = [*map(float, gaps), cpu, kib]
            shown = f"{kib:.1f}" if num_idle else ""
            rows.append((str(num_idle), *(f"{gap:.1f}" for gap in gaps), f"{cpu:.0%}", shown))
    columns = ("idle streams", "gap p50, ms", "p99", "CPU of a core", "KiB of an idle stream")
    report.table(f"{options.active} streams of a token every 50 ms beside idle ones", columns, rows)


async def _beside(
    port: int, pid: int, num_idle: int, prompts: list[list[int]], seconds: float
) -> tuple[list[Streamed], float, int]:
    """What the active streams read, the server's share of a core meanwhile, and its memory."""
    idle = [Reader(port) for _ in range(num_idle)]
    for start in range(0, num_idle, _OPENING):
        some = idle[start : start + _OPENING]
        await asyncio.gather(*(reader.open() for reader in some))
        await asyncio.gather(*(reader.ask(request_bytes([IDLE] * 8, 16)) for reader in some))
    memory = proc.rss_bytes(pid)
    begun, cpu = time.perf_counter(), cpu_seconds([pid])
    read = await streams(port, prompts, 20, seconds)
    share = (cpu_seconds([pid]) - cpu) / (time.perf_counter() - begun)
    for reader in idle:
        reader.close()
    return read, share, memory


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random()  # noqa: S311 - prompts
    return [[rng.randrange(20, 2048) for _ in range(_PROMPT_TOKENS)] for _ in range(count)]


@contextmanager
def _cluster(core: int, step_ms: float) -> Iterator[Cluster]:
    worker = {"engine": "mock", "mock_step_ms": step_ms, "mock_token_ms": 0.0}
    with (
        tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as folder,
        running(Path(folder), worker=worker) as cluster,
    ):
        _move(cluster.processes["gateway.1"].pid, core)
        yield cluster


@contextmanager
def _server(kind: str, core: int, step_ms: float) -> Iterator[tuple[int, int]]:
    """Port and process of a server of bare_http.py."""
    port = free_port()
    command = [sys.executable, "-m", "scripts.benchmarks.bare_http", kind, str(port)]
    process = subprocess.Popen([*command, "--step-ms", str(step_ms)], cwd=ROOT)
    try:
        asyncio.run(_listening(port))
        _move(process.pid, core)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _move(pid: int, core: int) -> None:
    """All threads of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


async def _listening(port: int) -> None:
    async with asyncio.timeout(_FAR_AWAY_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return
