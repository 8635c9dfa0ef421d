"""Each matrix product of a model, and attention, beside what one core can do.

Products of one shape are timed together, over all layers, so that weights come from memory as they
do in a step. Attention at a number of rows is that many sequences with --context positions each; at
512 rows it is also one prompt of 512. Limits are measured in the same rounds: see limits.py. A part
is at 100 % if it takes no more than its bytes or its operations, whichever is slower, take there.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from common.engine.attention import make_backend
from common.engine.attention.base import AttentionShape, Batch
from common.engine.config import load_config
from common.engine.kv_cache import TORCH_DTYPES, KvCache
from common.engine.model import Multiplies
from common.engine.runner import TorchEngine
from common.kv.layout import KvLayout
from scripts.benchmarks import engines, plots
from scripts.benchmarks.engines import model_folder
from scripts.benchmarks.limits import (
    Limits,
    by_shape,
    limit_parts,
    limits_of,
    product_operations,
    products,
    weight_bytes,
)
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report

_ROWS = (1, 4, 8, 16, 32, 64, 512)
_PROMPT = 512


class Part(NamedTuple):
    """A piece of a step's work, over all layers: what it reads, computes and does."""

    name: str
    rows: int
    num_bytes: float
    num_operations: float
    work: Callable[[], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    parser.add_argument("--context", type=int, default=512, help="positions of a sequence")
    plots.add_options(parser)


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    with model_folder(options) as folder:
        engine = TorchEngine(folder, threads=1)
        try:
            linears = list(engine.model.linears())
            layout = engine.info.layout
            config = load_config(folder)
            shape = AttentionShape.of(config, layout.block_size)
            parts = [*_products(linears), *_attention(shape, layout, options.context)]
            work = {(part.name, part.rows): part.work for part in parts}
            limit = {(name, 0): way for name, way in limit_parts(linears).items()}
            seconds = alternate(work | limit, options.rounds)
        finally:
            engine.close()
    limits = limits_of({name: seconds[name, 0] for name, _ in limit}, linears)
    settings = {"model": engines.name_of(options), "dtype": layout.dtype, "core": core}
    report = Report("kernel", {**settings, "context": options.context, "rounds": options.rounds})
    _show(report, parts, seconds, limits)
    if options.plots is not None:
        points = [
            plots.Point(
                part.name,
                part.num_operations / part.num_bytes,
                part.num_operations / spread(seconds[part.name, part.rows]).median,
            )
            for part in parts
        ]
        plots.roofline(
            options.plots, "kernel-roofline", points, limits.bytes_per_s, limits.operations_per_s
        )
    return report


def _products(linears: Sequence[Multiplies]) -> list[Part]:
    return [
        Part(
            f"{shape} ({len(same)})",
            rows,
            weight_bytes(same),
            product_operations(same, rows),
            products(same, rows),
        )
        for shape, same in by_shape(linears).items()
        for rows in _ROWS
    ]


def _attention(shape: AttentionShape, layout: KvLayout, context: int) -> list[Part]:
    """Decode steps of some sequences, of which all end at `context`, and one prompt."""
    per_sequence = -(-max(context, _PROMPT) // layout.block_size)
    counts = [rows for rows in _ROWS if rows < _PROMPT]
    num_blocks = per_sequence * counts[-1]
    arena = memoryview(mmap.mmap(-1, num_blocks * layout.block_bytes))
    cache = KvCache(layout, arena)
    engines.fill(cache)
    tables = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = tables.reshape(-1, per_sequence)
    position = layout.block_bytes / layout.block_size  # bytes of one, in all layers
    work = 4.0 * shape.num_heads * shape.head_dim * layout.num_layers  # of a row with a position
    parts = []
    for count in counts:
        starts = np.full(count, context - 1, np.int32)
        batch = Batch(np.arange(count + 1, dtype=np.int32), starts, tables[:count].copy())
        call = _attending(shape, layout, cache, batch)
        pairs = count * context
        parts.append(Part(f"attention to {context}", count, position * pairs, work * pairs, call))
    rows = np.array([0, _PROMPT], np.int32)
    batch = Batch(rows, np.zeros(1, np.int32), tables[:1].copy())
    call = _attending(shape, layout, cache, batch)
    pairs = _PROMPT * (_PROMPT + 1) // 2
    parts.append(Part("attention in a prompt", _PROMPT, position * _PROMPT, work * pairs, call))
    return parts


def _attending(
    shape: AttentionShape, layout: KvLayout, cache: KvCache, batch: Batch
) -> Callable[[], None]:
    backend = make_backend("auto", shape, fixed_order=False)
    rows = int(batch.row_starts[-1])
    queries = torch.randn(rows, shape.num_heads, shape.head_dim).to(TORCH_DTYPES[layout.dtype])
    out = torch.zeros_like(queries)

    def attend() -> None:
        with torch.inference_mode():
            backend.plan(batch)
            for layer in range(layout.num_layers):
                backend.attend(layer, queries, cache, out)

    return attend


def _show(
    report: Report, parts: list[Part], seconds: dict[tuple[str, int], list[float]], limits: Limits
) -> None:
    rows = []
    for part in parts:
        times = seconds[part.name, part.rows]
        least_s = limits.least_s(part.num_bytes, part.num_operations)
        share = spread(least_s / time for time in times)
        took = spread(times)
        report.figures[f"{part.name}, {part.rows}"] = {
            "seconds": took,
            "bytes": part.num_bytes,
            "operations": part.num_operations,
            "share_of_limit": share,
        }
        rows.append((
            part.name, str(part.rows), took.text(1e3, 2),
            f"{part.num_bytes / took.median / 1e9:.1f}",
            f"{part.num_operations / took.median / 1e9:.0f}",
            f"{least_s * 1e3:.2f}", f"{share.median:.0%}",
        ))  # fmt: skip
    report.figures["limits"] = vars(limits)
    columns = ("part, in all layers", "rows", "ms", "GB/s", "GFLOP/s", "limit, ms", "of the limit")
    report.table("median (p10 to p90); in brackets how many there are", columns, rows)
    report.note(limits.text())
