"""What int8 weights change: the time of steps, and the demo model's logits on text held out.

Two engines on one model, with int8 weights and without, in alternated rounds; then the demo model
both ways over the text that it was not trained on, in windows of its context: nats a token, and how
far the logits and the distributions that follow from them are apart, position by position.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.engine.quantization import QUANTIZATIONS
from common.engine.runner import TorchEngine
from common.engine.work import Work
from scripts.benchmarks import engines
from scripts.benchmarks.engines import DEMO, GREEDY, Bench, make_bench, model_folder
from scripts.benchmarks.measure import alternate, pin, spread
from scripts.benchmarks.report import Report
from scripts.demo.corpus import load_corpus
from scripts.demo.tokenizer import encode, held_out_documents

_CONTEXT = 512
_DECODES = (1, 8, 32)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    engines.add_options(parser)
    parser.add_argument("--windows", type=int, help="of text held out (default: all)")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    core = pin(options.core)
    report = Report("quantization", {"model": engines.name_of(options), "core": core})
    with model_folder(options) as folder:
        _add_times(report, folder, options.rounds)
    _add_quality(report, options.windows)
    return report


@contextlib.contextmanager
def _engines(folder: Path) -> Iterator[dict[str, TorchEngine]]:
    with contextlib.ExitStack() as stack:
        made = {}
        for name in QUANTIZATIONS:
            made[name] = TorchEngine(folder, threads=1, quantization=name)
            stack.callback(made[name].close)
        yield made


def _add_times(report: Report, folder: Path, rounds: int) -> None:
    with _engines(folder) as made:
        parts = {}
        for name, engine in made.items():
            bench = make_bench(engine, max(_DECODES), _CONTEXT)
            for count in _DECODES:
                decode = partial(bench.decode, count, _CONTEXT, GREEDY)
                parts[f"decode {count} x {_CONTEXT}", name] = decode
            parts[f"prefill 1 x {_CONTEXT}", name] = partial(bench.prefill, _CONTEXT)
        seconds = alternate(parts, rounds)
    rows = []
    for what in dict.fromkeys(what for what, _ in parts):
        plain, int8 = (seconds[what, name] for name in QUANTIZATIONS)
        ratio = spread(new / old for old, new in zip(plain, int8, strict=True))
        report.figures[what] = {"none": spread(plain), "int8": spread(int8), "ratio": ratio}
        times = (spread(plain).text(1e3), spread(int8).text(1e3))
        rows.append((what, *times, ratio.text(digits=2)))
    report.table("Milliseconds", ("", "none", "int8", "ratio"), rows)


def _add_quality(report: Report, most: int | None) -> None:
    windows = list(_windows())[:most]
    with _engines(DEMO) as made:
        benches = [make_bench(made[name], 1, len(windows[0])) for name in QUANTIZATIONS]
        found = [_compare(benches, window) for window in windows]
    weights = [len(window) - 1 for window in windows]
    plain, int8, divergence, same = np.average(
        [figures[:4] for figures in found], axis=0, weights=weights
    ).tolist()
    furthest = max(figures[4] for figures in found)
    report.figures["quality"] = {
        "tokens": sum(weights),
        "nats_none": plain,
        "nats_int8": int8,
        "kl": divergence,
        "same_first": same,
        "furthest_logit": furthest,
    }
    rows = [
        ("nats a token, none", f"{plain:.4f}"),
        ("nats a token, int8", f"{int8:.4f}"),
        ("perplexity, int8 over none", f"{np.exp(int8 - plain):.4f}"),
        ("mean KL divergence, nats", f"{divergence:.5f}"),
        ("same most likely token", f"{same:.2%}"),
        ("largest difference of a logit", f"{furthest:.3f}"),
    ]
    report.table(f"The demo model on {sum(weights)} tokens held out", ("", "int8"), rows)


def _windows() -> Iterator[list[int]]:
    """The held-out text, cut as scripts/train_demo_model.py cuts it."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = encode(tokenizer, held_out_documents(load_corpus().held_out)).tolist()
    engine = TorchEngine(DEMO)
    length = engine.info.max_model_len
    engine.close()
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + length + 1]


def _compare(benches: list[Bench], window: list[int]) -> tuple[float, float, float, float, float]:
    """Mean losses of both, mean divergence, share of equal first tokens, furthest logit."""
    plain, int8 = (_logits(bench, window[:-1]) for bench in benches)
    following = torch.tensor(window[1:])[:, None]
    sure, guess = plain.log_softmax(-1), int8.log_softmax(-1)
    losses = [-float(each.gather(1, following).mean()) for each in (sure, guess)]
    divergence = float((sure.exp() * (sure - guess)).sum(-1).mean())
    same = float((plain.argmax(-1) == int8.argmax(-1)).float().mean())
    return losses[0], losses[1], divergence, same, float((plain - int8).abs().max())


def _logits(bench: Bench, tokens: list[int]) -> Tensor:
    """After each of the tokens, [len(tokens), vocabulary]."""
    count = len(tokens)
    work = Work(tokens, count, 0, count, bench.tables[0], GREEDY, sample=False)
    with torch.inference_mode():
        hidden, _ = bench.engine._forward([work])
        return bench.engine.model.logits(hidden, torch.arange(count))
