"""What int8 weights, activations and KV change: the time of steps, and the demo model's logits on
text held out.

Engines on one model, as it is and with int8, in alternated rounds; then the demo model in the same
ways over the text that it was not trained on, in windows of its context: nats a token, and how far
the logits and the distributions that follow from them are apart, position by position.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.engine.runner import TorchEngine
from common.engine.work import Work
from scripts.benchmarks import engines
from scripts.benchmarks.engines import DEMO, GREEDY, Bench, make_bench, model_folder
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report
from scripts.demo.corpus import load_corpus
from scripts.demo.tokenizer import encode, held_out_documents

_PLAIN = "none"
_SETTINGS = {  # quantization and kv_cache_dtype of an engine
    _PLAIN: ("none", "auto"),
    "weights": ("int8", "auto"),
    "w8a8": ("w8a8_int8", "auto"),
    "kv": ("none", "int8"),
    "both": ("int8", "int8"),
}
_VARIANTS = tuple(_SETTINGS)[1:]
_STEPS = ("decode", "prefill")


class Distance(NamedTuple):
    """How far a variant is from the plain model: means over positions, and one maximum."""

    nats: float  # its loss, a token
    divergence: float  # from the plain model's distributions, in nats
    same_first: float  # share of positions with the same most likely token
    furthest_logit: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    add = parser.add_argument
    add("--variants", nargs="+", choices=_VARIANTS, default=list(_VARIANTS), help="(default: all)")
    add("--contexts", nargs="*", type=int, default=[512], help="positions (default: 512)")
    add("--sequences", nargs="+", type=int, default=[1, 8, 32], help="(default: 1 8 32)")
    add("--steps", nargs="+", choices=_STEPS, default=_STEPS, help="what to time (default: both)")
    add("--windows", type=int, help="of text held out (default: all; 0: none)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    report = Report("quantization", {"model": engines.name_of(options), "core": core})
    if options.contexts:
        with model_folder(options) as folder:
            for context in options.contexts:
                _add_times(report, folder, context, options)
    if options.windows != 0:
        _add_quality(report, options.variants, options.windows)
    return report


@contextlib.contextmanager
def _engines(folder: Path, variants: Sequence[str]) -> Iterator[dict[str, TorchEngine]]:
    """The plain one first."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name in (_PLAIN, *variants):
            quantization, kv = _SETTINGS[name]
            made[name] = TorchEngine(
                folder, threads=1, quantization=quantization, kv_cache_dtype=kv
            )
            stack.callback(made[name].close)
        yield made


def _add_times(report: Report, folder: Path, context: int, options: argparse.Namespace) -> None:
    decodes = options.sequences if "decode" in options.steps else []
    with _engines(folder, options.variants) as made:
        parts = {}
        for name, engine in made.items():
            bench = make_bench(engine, max(decodes, default=1), context)
            for count in decodes:
                what = f"decode {count} x {context}"
                parts[what, name] = partial(bench.decode, count, context, GREEDY)
            if "prefill" in options.steps:
                parts[f"prefill 1 x {context}", name] = partial(bench.prefill, context)
        seconds = alternate(parts, options.rounds)
    rows = []
    for what in dict.fromkeys(what for what, _ in parts):
        plain = seconds[what, _PLAIN]
        figures = {_PLAIN: spread(plain)}
        cells = [f"{spread(plain).median * 1e3:.1f}"]
        for name in options.variants:
            ratio = spread(new / old for old, new in zip(plain, seconds[what, name], strict=True))
            figures |= {name: spread(seconds[what, name]), f"{name} ratio": ratio}
            cells.append(ratio.text(digits=2))
        report.figures[what] = figures
        rows.append((what, *cells))
    columns = (f"{_PLAIN}, ms", *options.variants)
    report.table("Milliseconds, and the ratio to them with int8 for", ("", *columns), rows)


def _add_quality(report: Report, variants: Sequence[str], most: int | None) -> None:
    windows = list(_windows())[:most]
    with _engines(DEMO, variants) as made:
        benches = {name: make_bench(engine, 1, len(windows[0])) for name, engine in made.items()}
        found = [_compare(benches, window) for window in windows]
    weights = [len(window) - 1 for window in windows]
    total = {}
    for name in benches:
        each = [figures[name] for figures in found]
        nats, divergence, same_first, _ = np.average(each, axis=0, weights=weights).tolist()
        furthest = max(figures.furthest_logit for figures in each)
        total[name] = Distance(nats, divergence, same_first, furthest)
        report.figures[f"quality {name}"] = {"tokens": sum(weights), **total[name]._asdict()}
    plain = total.pop(_PLAIN)
    lines: dict[str, tuple[str, Callable[[Distance], str]]] = {
        "nats a token": (f"{plain.nats:.4f}", lambda d: f"{d.nats:.4f}"),
        "perplexity over none's": ("", lambda d: f"{np.exp(d.nats - plain.nats):.5f}"),
        "mean KL divergence, nats": ("", lambda d: f"{d.divergence:.6f}"),
        "same most likely token": ("", lambda d: f"{d.same_first:.2%}"),
        "largest difference of a logit": ("", lambda d: f"{d.furthest_logit:.3f}"),
    }
    rows = [
        (title, first, *(show(distance) for distance in total.values()))
        for title, (first, show) in lines.items()
    ]
    title = f"The demo model on {sum(weights)} tokens held out; int8 for"
    report.table(title, ("", _PLAIN, *total), rows)


def _windows() -> Iterator[list[int]]:
    """The held-out text, cut as scripts/train_demo_model.py cuts it."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = encode(tokenizer, held_out_documents(load_corpus().held_out)).tolist()
    engine = TorchEngine(DEMO)
    length = engine.info.max_model_len
    engine.close()
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + length + 1]


def _compare(benches: dict[str, Bench], window: list[int]) -> dict[str, Distance]:
    """Of each from the first."""
    following = torch.tensor(window[1:])[:, None]
    logits = {name: _logits(bench, window[:-1]) for name, bench in benches.items()}
    plain = logits[_PLAIN]
    sure = plain.log_softmax(-1)
    found = {}
    for name, its in logits.items():
        guess = its.log_softmax(-1)
        found[name] = Distance(
            nats=-float(guess.gather(1, following).mean()),
            divergence=float((sure.exp() * (sure - guess)).sum(-1).mean()),
            same_first=float((plain.argmax(-1) == its.argmax(-1)).float().mean()),
            furthest_logit=float((plain - its).abs().max()),
        )
    return found


def _logits(bench: Bench, tokens: list[int]) -> Tensor:
    """After each of the tokens, [len(tokens), vocabulary]."""
    count = len(tokens)
    work = Work(tokens, count, 0, count, bench.tables[0], GREEDY, sample=False)
    with torch.inference_mode():
        hidden, _ = bench.engine._forward([work])
        return bench.engine.model.logits(hidden, torch.arange(count))
