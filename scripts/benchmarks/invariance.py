"""What batch-invariant mode costs, and how often a token depends on its batch without it.

Cost: two engines on one model, with the mode and without, in alternated rounds. Differences:
prompts from this project's own source are continued twice, among other sequences each time and cut
into other chunks; the second time the tokens of the first are forced, so that each position is
compared by itself: whether another token would have been drawn, and whether its log-probability
differs, in the last bit even.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from common.engine.runner import TorchEngine
from common.engine.work import Sampled, Work
from kvbaton.sampling import SamplingParams
from scripts.benchmarks import engines
from scripts.benchmarks.engines import DEMO, GREEDY, Bench, make_bench, model_folder, source_prompts
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_PROMPT_TOKENS = 48
_MOST_TOGETHER = 32
_CONTEXT = 512
# 37 rows are padded in batch-invariant mode; 32 are not.
_DECODES = (1, 32, 37)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    parser.add_argument("--prompts", type=int, default=200, help="continued (default: 200)")
    parser.add_argument("--tokens", type=int, default=32, help="compared of each (default: 32)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    with model_folder(options) as folder:
        model = engines.name_of(options)
        settings = {"model": model, "core": core, "prompts": options.prompts}
        report = Report("invariance", {**settings, "tokens": options.tokens})
        _add_cost(report, folder, options.rounds)
        rows: list[tuple[str, ...]] = []
        for name, path in {model: folder, "demo": DEMO}.items():
            prompts = source_prompts(path, options.prompts, _PROMPT_TOKENS)
            for mode, invariant in (("default", False), ("invariant", True)):
                with _engine(path, batch_invariant=invariant) as engine:
                    found = _differences(engine, prompts, options.tokens)
                report.figures[f"{name}, {mode}"] = found
                rows += [(name, mode, kind, *_cells(counts)) for kind, counts in found.items()]
        columns = ("model", "mode", "sampling", "tokens", "differ", "sequences", "logprobs")
        report.table("Compared tokens that depend on the batch", columns, rows)
        report.note("sequences: with such tokens; logprobs: that differ, in the last bit even")
    return report


@contextlib.contextmanager
def _engine(folder: Path, *, batch_invariant: bool) -> Iterator[TorchEngine]:
    engine = TorchEngine(folder, threads=1, batch_invariant=batch_invariant)
    try:
        yield engine
    finally:
        engine.close()


def _add_cost(report: Report, folder: Path, rounds: int) -> None:
    with (
        _engine(folder, batch_invariant=False) as default,
        _engine(folder, batch_invariant=True) as invariant,
    ):
        parts = {
            (what, mode): part
            for mode, engine in (("default", default), ("invariant", invariant))
            for what, part in _steps(make_bench(engine, max(_DECODES), _CONTEXT)).items()
        }
        seconds = alternate(parts, rounds)
    rows = []
    for what in dict.fromkeys(what for what, _ in parts):
        times = [seconds[what, mode] for mode in ("default", "invariant")]
        ratio = spread(with_mode / without for without, with_mode in zip(*times, strict=True))
        without, with_mode = map(spread, times)
        report.figures[what] = {"default": without, "invariant": with_mode, "ratio": ratio}
        rows.append((what, without.text(1e3), with_mode.text(1e3), ratio.text(digits=2)))
    report.table("Milliseconds", ("", "default", "invariant", "ratio"), rows)


def _steps(bench: Bench) -> dict[str, Callable[[], None]]:
    steps: dict[str, Callable[[], None]] = {
        f"decode {count} x {_CONTEXT}": partial(bench.decode, count, _CONTEXT, GREEDY)
        for count in _DECODES
    }
    return steps | {f"prefill 1 x {_CONTEXT}": partial(bench.prefill, _CONTEXT)}


def _differences(
    engine: TorchEngine, prompts: list[list[int]], num_tokens: int
) -> dict[str, dict[str, int]]:
    """How many tokens were compared, how many differ, and how many sequences have such."""
    bench = make_bench(engine, _MOST_TOGETHER, _PROMPT_TOKENS + num_tokens)
    forced = np.full((len(prompts), num_tokens), -1)
    found = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = SamplingParams(temperature=temperature, seed=7, logprobs=0)
        first, first_logprobs = _continue(bench, prompts, sampling, 1, forced)
        second, second_logprobs = _continue(bench, prompts, sampling, 2, first)
        differ = first != second
        found[kind] = {
            "tokens": differ.size,
            "differ": int(differ.sum()),
            "sequences": int(differ.any(axis=1).sum()),
            "logprobs_differ": int((first_logprobs != second_logprobs).sum()),
        }
    return found


def _cells(counts: dict[str, int]) -> tuple[str, ...]:
    names = ("tokens", "differ", "sequences", "logprobs_differ")
    return tuple(str(counts[name]) for name in names)


def _continue(
    bench: Bench,
    prompts: list[list[int]],
    sampling: SamplingParams,
    seed: int,
    forced: IntArray,
) -> tuple[IntArray, FloatArray]:
    """The tokens drawn and their log-probabilities, both [prompts, num_tokens].

    `seed` decides in which groups, and how they are cut. Each position follows on `forced`, of the
    same shape, or on what was drawn where that is -1.
    """
    rng = np.random.default_rng(seed)
    drawn, logprobs = np.empty_like(forced), np.empty(forced.shape)
    waiting: list[int] = rng.permutation(len(prompts)).tolist()
    while waiting:
        size = int(rng.integers(1, _MOST_TOGETHER + 1))
        group, waiting = waiting[:size], waiting[size:]
        sequences = [list(prompts[index]) for index in group]
        computed = int(rng.integers(1, _PROMPT_TOKENS))
        _step(bench, [tokens[:computed] for tokens in sequences], 0, sampling)
        for place in range(forced.shape[1]):
            results = _step(bench, sequences, computed, sampling)
            drawn[group, place] = [result.token_id for result in results]
            logprobs[group, place] = [result.logprob for result in results]
            computed = _PROMPT_TOKENS + place
            follow = np.where(forced[group, place] < 0, drawn[group, place], forced[group, place])
            for tokens, token in zip(sequences, follow.tolist(), strict=True):
                tokens.append(token)
    return drawn, logprobs


def _step(
    bench: Bench, sequences: list[list[int]], start: int, sampling: SamplingParams
) -> list[Sampled]:
    """Compute each sequence from `start` on; what was drawn after it."""
    works = [
        Work(tokens, _PROMPT_TOKENS, start, len(tokens) - start, table, sampling)
        for tokens, table in zip(sequences, bench.tables, strict=False)
    ]
    return [result for result in bench.engine.step_sync(works) if result is not None]
