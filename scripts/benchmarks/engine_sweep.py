"""Prefill by length, and decode steps by sequences and context, over what one core can do.

A step's bytes are its weights, once, and the KV that it reads; its operations those of its products
(of the rows that are computed; the head's only where a token is drawn) and of attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from common.engine.runner import TorchEngine
from scripts.benchmarks.engines import GREEDY, Bench, make_bench
from scripts.benchmarks.limits import (
    Limits,
    limit_parts,
    limits_of,
    product_operations,
    weight_bytes,
)
from scripts.benchmarks.measure import Spread, alternate, spread
from scripts.benchmarks.report import Report

_PROMPTS = (128, 256, 512, 1024, 2048, 4096)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (128, 512, 1024, 2048, 4096)


def add_options(parser: argparse.ArgumentParser) -> None:
    """How much of it."""
    add = parser.add_argument
    add("--sweep-rounds", type=int, default=5, help="of the two tables; 0: neither (default: 5)")
    add("--prompts", type=int, nargs="+", default=_PROMPTS, metavar="N")
    add("--batches", type=int, nargs="+", default=_SEQUENCES, metavar="N")
    add("--contexts", type=int, nargs="+", default=_CONTEXTS, metavar="N")
    add("--sweep-kv", type=float, default=2.0, metavar="GIB",
        help="KV at most: steps that read more are left out (default: 2)")  # fmt: skip


class _Sizes:
    """What steps of an engine read and compute."""

    def __init__(self, engine: TorchEngine) -> None:
        self.linears = list(engine.model.linears())
        *self._body, self._head = self.linears
        layout = engine.info.layout
        self._position_bytes = layout.block_bytes / layout.block_size
        config = engine.model.config
        self._pair_operations = 4.0 * config.num_heads * config.head_dim * layout.num_layers

    def decode(self, sequences: int, context: int) -> tuple[float, float]:
        """Bytes and operations of a step of so many sequences, of which all end at `context`."""
        pairs = sequences * context
        return (
            weight_bytes(self.linears) + pairs * self._position_bytes,
            product_operations(self.linears, sequences) + pairs * self._pair_operations,
        )

    def prefill(self, length: int) -> tuple[float, float]:
        """Bytes and operations of a prompt with its first token."""
        products = product_operations(self._body, length) + product_operations([self._head], 1)
        pairs = length * (length + 1) / 2
        return (
            weight_bytes(self.linears) + length * self._position_bytes,
            products + pairs * self._pair_operations,
        )


def _cut(bench: Bench, num_blocks: int) -> Bench:
    """The same arena, its one long table cut into those of sequences with so many blocks."""
    (slots,) = bench.tables
    tables = [slots[at : at + num_blocks] for at in range(0, len(slots), num_blocks)]
    return replace(bench, tables=tables)


def add_sweep(report: Report, options: argparse.Namespace, engine: TorchEngine) -> None:
    """Measure and add both tables."""
    sizes = _Sizes(engine)
    layout = engine.info.layout
    most = int(options.sweep_kv * 2**30 / layout.block_bytes) * layout.block_size  # positions
    steps = [
        (sequences, context)
        for context in options.contexts
        for sequences in options.batches
        if sequences * context <= most and context <= engine.info.max_model_len
    ]
    prompts = [length for length in options.prompts if length <= engine.info.max_model_len]
    largest = max(
        [*prompts, *(sequences * (context + layout.block_size) for sequences, context in steps)]
    )
    bench = make_bench(engine, 1, largest)
    parts: dict[tuple[str, int, int], Callable[[], object]] = {
        ("prefill", 1, length): partial(bench.prefill, length) for length in prompts
    }
    for sequences, context in steps:
        per_sequence = -(-context // layout.block_size)
        step = _cut(bench, per_sequence)
        parts["decode", sequences, context] = partial(step.decode, sequences, context, GREEDY)
    for name, way in limit_parts(sizes.linears).items():
        parts[name, 0, 0] = way
    seconds = alternate(parts, options.sweep_rounds)
    limits = limits_of(
        {name: times for (name, rows, _), times in seconds.items() if not rows}, sizes.linears
    )
    times = {key: spread(each) for key, each in seconds.items() if key[1]}
    _show_prefill(report, sizes, times, limits)
    _show_decode(report, sizes, times, limits)
    report.figures["limits"] = vars(limits)
    report.note(limits.text())


def _show_prefill(
    report: Report, sizes: _Sizes, times: Mapping[tuple[str, int, int], Spread], limits: Limits
) -> None:
    rows = []
    for (name, _, length), took in sorted(times.items()):
        if name != "prefill":
            continue
        least_s = limits.least_s(*sizes.prefill(length))
        report.figures[f"prefill {length}"] = {"seconds": took, "limit_s": least_s}
        rows.append((
            f"{length:,}", took.text(1e3, 0), f"{length / took.median:.0f}",
            f"{least_s * 1e3:.0f}", f"{least_s / took.median:.0%}",
        ))  # fmt: skip
    columns = ("prompt", "ms", "tokens/s", "limit, ms", "of the limit")
    report.table("prefill, first token included: median (p10 to p90)", columns, rows)


def _show_decode(
    report: Report, sizes: _Sizes, times: Mapping[tuple[str, int, int], Spread], limits: Limits
) -> None:
    """A row for each number of sequences, a column for each context."""
    cells: dict[int, dict[int, str]] = {}
    contexts: dict[int, None] = {}
    for (name, sequences, context), took in sorted(times.items()):
        if name != "decode":
            continue
        num_bytes, num_operations = sizes.decode(sequences, context)
        least_s = limits.least_s(num_bytes, num_operations)
        report.figures[f"decode {sequences} x {context}"] = {
            "seconds": took,
            "bytes": num_bytes,
            "operations": num_operations,
            "limit_s": least_s,
            "over_limit": took.median / least_s,
        }
        bound = "bytes" if least_s == num_bytes / limits.bytes_per_s else "operations"
        over = f"{took.median / least_s:.2f} x {bound[0]}"
        cells.setdefault(sequences, {})[context] = f"{took.median * 1e3:.1f} ({over})"
        contexts[context] = None
    rows = [
        (str(sequences), *(own.get(context, "-") for context in contexts))
        for sequences, own in cells.items()
    ]
    report.table(
        "decode step: ms (times the limit by b: bytes, o: operations) by context",
        ("sequences", *(f"{context:,}" for context in contexts)),
        rows,
    )
