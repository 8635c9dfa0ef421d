"""Decode steps of one engine against what the machine allows, and prefill.

A decode step must at least read its weights and its KV. The floor adds up two times, measured in
the same rounds on the same core: the model's own matrix products, alone, and a plain read of as
many bytes as the KV has. Products at few rows stream weights from memory; from some batch size on
they are bound by arithmetic instead. So there are two floors: with products of the step's own rows
(what a step could take if all else were free), and with products of 4 rows (memory alone).

Then prefill by length and decode steps by sequences and context, over the limits of one core as
they were measured in the same rounds: see engine_sweep.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from common.engine.linear import MIN_ROWS
from common.engine.model import Multiplies
from common.engine.runner import TorchEngine
from kvbaton.sampling import SamplingParams
from scripts.benchmarks import engine_sweep, engines
from scripts.benchmarks.engines import GREEDY, Bench, make_bench, model_folder
from scripts.benchmarks.limits import products, weight_bytes
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    parser.add_argument("--sequences", type=int, default=32, help="in a decode step (default: 32)")
    parser.add_argument("--context", type=int, default=512, help="tokens of each (default: 512)")
    engine_sweep.add_options(parser)


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    with model_folder(options) as folder:
        engine = TorchEngine(folder, threads=1)
        try:
            return _measure(options, engine, core)
        finally:
            engine.close()


def _measure(options: argparse.Namespace, engine: TorchEngine, core: int) -> Report:
    sequences, context = options.sequences, options.context
    bench = make_bench(engine, sequences, context)
    linears = list(engine.model.linears())
    seconds = alternate(_parts(bench, linears, sequences, context), options.rounds)
    layout = engine.info.layout
    num_weight_bytes = weight_bytes(linears)
    kv_bytes = sequences * context * layout.block_bytes // layout.block_size
    report = Report(
        "engine",
        {
            "model": engines.name_of(options),
            "dtype": layout.dtype,
            "core": core,
            "sequences": sequences,
            "context": context,
            "weight_bytes": num_weight_bytes,
            "kv_bytes": kv_bytes,
        },
    )
    _add_times(report, seconds, num_weight_bytes, kv_bytes, context)
    _add_ratios(report, seconds)
    if options.sweep_rounds:
        engine_sweep.add_sweep(report, options, engine)
    return report


def _parts(
    bench: Bench, linears: Sequence[Multiplies], sequences: int, context: int
) -> dict[str, Callable[[], object]]:
    numbers = torch.frombuffer(bench.arena, dtype=torch.float32)
    sampled = SamplingParams(temperature=1.0, seed=1)
    return {
        "decode": lambda: bench.decode(sequences, context, GREEDY),
        "kv_read": numbers.sum,
        "products": products(linears, max(sequences, MIN_ROWS)),
        "weights": products(linears, MIN_ROWS),
        "decode_sampled": lambda: bench.decode(sequences, context, sampled),
        "decode_one": lambda: bench.decode(1, context, GREEDY),
        "prefill": lambda: bench.prefill(context),
    }


def _add_times(
    report: Report,
    seconds: dict[str, list[float]],
    num_weight_bytes: int,
    kv_bytes: int,
    context: int,
) -> None:
    sequences = report.settings["sequences"]
    lines = {
        "decode": (f"decode step, {sequences} x {context}", sequences, "tokens/s"),
        "decode_sampled": ("the same at temperature 1", sequences, "tokens/s"),
        "decode_one": (f"decode step, 1 x {context}", 1, "tokens/s"),
        "prefill": (f"prefill, 1 x {context}", context, "tokens/s"),
        "products": (f"products, {max(sequences, MIN_ROWS)} rows", num_weight_bytes / 1e9, "GB/s"),
        "weights": (f"products, {MIN_ROWS} rows", num_weight_bytes / 1e9, "GB/s"),
        "kv_read": ("plain read of the KV", kv_bytes / 1e9, "GB/s"),
    }
    rows = []
    for name, (text, amount, unit) in lines.items():
        time = spread(seconds[name])
        rate = spread(amount / second for second in seconds[name])
        report.figures[name] = {"seconds": time, "rate": rate, "unit": unit}
        digits = 1 if unit == "GB/s" else 0
        rows.append((text, time.text(1e3), rate.text(digits=digits), unit))
    report.table("Medians (p10 to p90)", ("", "ms", "rate", "of"), rows)


def _add_ratios(report: Report, seconds: dict[str, list[float]]) -> None:
    """Each round's step over the same round's floor."""
    rows = []
    for name, weights, text in (
        ("ratio", "products", "products of its own rows + KV read"),
        ("ratio_to_memory", "weights", f"products of {MIN_ROWS} rows + KV read"),
    ):
        floors = [sum(pair) for pair in zip(seconds[weights], seconds["kv_read"], strict=True)]
        ratio = spread(step / floor for step, floor in zip(seconds["decode"], floors, strict=True))
        report.figures[name] = ratio
        rows.append((text, spread(floors).text(1e3), ratio.text(digits=2)))
    report.table("The decode step over its floor", ("floor", "ms", "ratio"), rows)
