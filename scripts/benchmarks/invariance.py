"""What batch-invariant mode costs, and how often a token depends on its batch without it.

Cost: two engines on one model, with the mode and without, in alternated rounds. Differences:
prompts from this project's own source are continued twice, among other sequences each time and cut
into other chunks; the second time the tokens of the first are forced, so that each position is
compared by itself. A difference is a token that would have been drawn otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.engine.runner import TorchEngine
from common.engine.work import Work
from kvbaton.sampling import SamplingParams
from scripts.benchmarks import engines
from scripts.benchmarks.engines import DEMO, GREEDY, Bench, make_bench, model_folder, source_prompts
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report

_PROMPT_TOKENS = 48
_MOST_TOGETHER = 32
_PARTS = {
    "decode": "decode step, 32 x 512",
    "decode_one": "decode step, 1 x 512",
    "prefill": "prefill, 1 x 512",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    parser.add_argument("--prompts", type=int, default=200, help="continued (default: 200)")
    parser.add_argument("--tokens", type=int, default=32, help="compared of each (default: 32)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    with model_folder(options) as folder:
        model = options.preset if options.model is None else str(options.model)
        settings = {"model": model, "core": core, "prompts": options.prompts}
        report = Report("invariance", {**settings, "tokens": options.tokens})
        _add_cost(report, folder, options.rounds)
        rows = []
        for name, path in ((model, folder), ("demo", DEMO)):
            for invariant in (False, True):
                with _engine(path, invariant) as engine:
                    rows += _differences(report, name, path, engine, options, invariant)
        columns = ("model", "mode", "sampling", "tokens", "differ", "sequences")
        report.table("Tokens that depend on the batch", columns, rows)
    return report


@contextlib.contextmanager
def _engine(folder: Path, invariant: bool) -> Iterator[TorchEngine]:
    engine = TorchEngine(folder, threads=1, batch_invariant=invariant)
    try:
        yield engine
    finally:
        engine.close()


def _add_cost(report: Report, folder: Path, rounds: int) -> None:
    with _engine(folder, False) as plain, _engine(folder, True) as invariant:
        parts = {}
        for mode, engine in (("default", plain), ("invariant", invariant)):
            bench = make_bench(engine, 32, 512)
            parts |= {
                f"decode {mode}": lambda bench=bench: bench.decode(32, 512, GREEDY),
                f"decode_one {mode}": lambda bench=bench: bench.decode(1, 512, GREEDY),
                f"prefill {mode}": lambda bench=bench: bench.prefill(512),
            }
        seconds = alternate(parts, rounds)
    rows = []
    for name, text in _PARTS.items():
        modes = [seconds[f"{name} {mode}"] for mode in ("default", "invariant")]
        ratio = spread(with_mode / without for without, with_mode in zip(*modes, strict=True))
        default, invariant_time = map(spread, modes)
        report.figures[name] = {"default": default, "invariant": invariant_time, "ratio": ratio}
        rows.append((text, default.text(1e3), invariant_time.text(1e3), ratio.text(digits=2)))
    report.table("Milliseconds", ("", "default", "invariant", "ratio"), rows)


def _differences(
    report: Report,
    name: str,
    folder: Path,
    engine: TorchEngine,
    options: argparse.Namespace,
    invariant: bool,
) -> list[tuple[str, ...]]:
    prompts = source_prompts(folder, options.prompts, _PROMPT_TOKENS)
    bench = make_bench(engine, _MOST_TOGETHER, _PROMPT_TOKENS + options.tokens)
    mode = "invariant" if invariant else "default"
    rows = []
    for kind, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        sampling = SamplingParams(temperature=temperature, seed=7)
        first = _continue(bench, prompts, options.tokens, sampling, 1, None)
        second = _continue(bench, prompts, options.tokens, sampling, 2, first)
        differ = first != second
        found = {"tokens": differ.size, "differ": int(differ.sum())}
        found["sequences"] = int(differ.any(axis=1).sum())
        report.figures[f"{name}, {mode}, {kind}"] = found
        share = f"{found['differ']} ({found['differ'] / differ.size:.3%})"
        sequences = f"{found['sequences']} of {len(prompts)}"
        rows.append((name, mode, kind, str(differ.size), share, sequences))
    return rows


def _continue(
    bench: Bench,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: SamplingParams,
    seed: int,
    forced: np.ndarray[Any, Any] | None,
) -> np.ndarray[Any, Any]:
    """The tokens drawn, [prompts, num_tokens], in an order and in groups that `seed` decides.

    With `forced`, of the same shape, each position follows on those instead of on what was drawn.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(prompts), num_tokens), dtype=np.int64)
    waiting: list[int] = rng.permutation(len(prompts)).tolist()
    while waiting:
        size = int(rng.integers(1, _MOST_TOGETHER + 1))
        group, waiting = waiting[:size], waiting[size:]
        sequences = [list(prompts[index]) for index in group]
        cut = int(rng.integers(1, _PROMPT_TOKENS))
        _step(bench, sequences, 0, cut, sampling)
        computed = cut
        for place in range(num_tokens):
            drawn[group, place] = _step(bench, sequences, computed, None, sampling)
            computed = _PROMPT_TOKENS + place
            follow = drawn if forced is None else forced
            for index, tokens in zip(group, sequences, strict=True):
                tokens.append(int(follow[index, place]))
    return drawn


def _step(
    bench: Bench, sequences: list[list[int]], start: int, stop: int | None, sampling: SamplingParams
) -> list[int]:
    """Compute [start, stop) of each; without `stop` all that is left, and the tokens that follow."""
    works = [
        Work(
            tokens=tokens,
            num_prompt_tokens=_PROMPT_TOKENS,
            start=start,
            num_tokens=(len(tokens) if stop is None else stop) - start,
            slots=table,
            sampling=sampling,
            sample=stop is None,
        )
        for tokens, table in zip(sequences, bench.tables, strict=False)
    ]
    return [result.token_id for result in bench.engine.step_sync(works) if result is not None]
