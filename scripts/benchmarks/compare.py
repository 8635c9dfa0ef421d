"""Several servers under the same load, in turn and in rounds; ratios are of each round.

One runs at a time, on the same cores as the others, and every round has another order. In a round
all get the same load: requests that come at the same moments, with prompts that nobody has seen.
Targets: kvbaton, kvbaton-colocated, vllm, vllm:192 (tokens in a step), vllm-pd, llama-cpp,
url=ADDRESS, command=COMMAND with {port}, {model} and {cores} in it. kvbaton's may carry settings:
kvbaton:gateway.max_local_tokens=0,decode.max_num_seqs=32. The first is what the others are compared
with; where --ttft is a multiple, it is of the first one's unloaded time in the first round.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from scripts.benchmarks import engines, plots, targets, trials
from scripts.benchmarks.attainment import Targets
from scripts.benchmarks.measure import all_cores, spread
from scripts.benchmarks.report import Report
from scripts.benchmarks.servers import Setting
from scripts.benchmarks.trial_tables import add_bound, add_loads, add_shares, goodput_text
from scripts.benchmarks.trials import Plan, Trial, Trials, core_list, make_plan


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    add("target", nargs="+", help="what to compare; see above")
    engines.add_model_options(parser)
    add("--cores", help="cores of every server, such as 0,1 (default: all)")
    add("--rounds", type=int, default=3, help="of each target (default: 3)")
    add("--prefill", type=int, default=1, metavar="N", help="kvbaton's prefill workers")
    add("--decode", type=int, default=1, metavar="N", help="kvbaton's decode workers")
    add("--vllm-venv", type=Path, metavar="DIR", help="virtual environment with vLLM")
    add("--llama-venv", type=Path, metavar="DIR", help="one with llama-cpp-python and gguf")
    trials.add_options(parser)
    plots.add_options(parser)


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    with (
        engines.model_folder(options) as model,
        tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as folder,
    ):
        setting = Setting(
            model=model,
            cores=core_list(options.cores) or all_cores(),
            folder=Path(folder),
            num_prefill=options.prefill,
            num_decode=options.decode,
            vllm_venv=options.vllm_venv,
            llama_venv=options.llama_venv,
        )
        plan = make_plan(options, engines.vocab_of(model))
        found = _measure(options.target, plan, setting, options.rounds)
    return _report(options, plan, setting, found)


def _measure(names: list[str], plan: Plan, setting: Setting, rounds: int) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {name: [] for name in names}
    fixed: Targets | None = None
    for number in range(rounds):
        first = number % len(names)
        in_round = replace(plan, seed=plan.seed + 1000 * number)
        for name in names[first:] + names[:first]:
            before = found[name][-1].goodput if found[name] else None
            with targets.server(name, setting) as served:
                found[name].append(Trials(in_round, served, fixed).run(before))
            if fixed is None:
                fixed = found[name][0].targets
    return found


def _report(
    options: argparse.Namespace, plan: Plan, setting: Setting, found: dict[str, list[Trial]]
) -> Report:
    first = found[options.target[0]]
    report = Report(
        "compare",
        {
            "model": engines.name_of(options),
            "mix": plan.mix,
            "cores": setting.cores,
            "targets": str(first[0].targets),
            "requests": plan.num_requests,
            "rounds": len(first),
        },
    )
    for name, tried in found.items():
        report.figures[name] = {"rounds": [trial.figures() for trial in tried]}
        add_loads(report, f"{name}, last round", tried[-1])
        add_shares(report, f"{name}, last round", tried[-1])
    for load in first[0].loads:
        if not load.spec.rate or load.spec.rate in plan.rates:
            _add_figures(report, found, load.title)
    if plan.is_goodput:
        _add_goodput(report, found)
        for name, tried in found.items():
            report.note(f"{name}: {goodput_text(tried, plan.precision)}")
        add_bound(report, first[-1], options.prefill, len(setting.cores))
    if options.plots is not None:
        plots.draw_trials(options.plots, "compare", found, plan)
    return report


def _add_figures(report: Report, found: dict[str, list[Trial]], title: str) -> None:
    """One load of all targets: medians over rounds, and each round's ratio to the first target."""
    rows = []
    names = ("requests_per_s", "ttft_s", "tpot_s", "step_s")
    values = {
        target: {name: [_figure(trial, title, name) for trial in tried] for name in names}
        for target, tried in found.items()
    }
    base = next(iter(values.values()))
    for target, own in values.items():
        cells = [target]
        for name, scale, digits in zip(names, (1, 1e3, 1e3, 1e3), (2, 0, 1, 1), strict=True):
            if not all(own[name]) or not all(base[name]):
                cells += ["", ""]
                continue
            ratio = spread(a / b for a, b in zip(own[name], base[name], strict=True))
            cells += [spread(own[name]).text(scale, digits), f"{ratio.median:.2f}"]
            report.figures[target][f"{title}, {name}, ratio"] = ratio
        rows.append(tuple(cells))
    columns = (
        "target", "done/s", "ratio", "TTFT p50, ms", "ratio", "TPOT p50, ms", "ratio",
        "step, ms", "ratio",
    )  # fmt: skip
    report.table(f"{title}: median (p10 to p90) of rounds, ratio to the first", columns, rows)


def _figure(trial: Trial, title: str, name: str) -> float:
    """Of the load with that title; 0 if there is none."""
    for load in trial.loads:
        if load.title == title:
            figures = load.figures(None)
            if name in figures:
                return float(figures[name] or 0.0)
            return load.percentiles(name)[0]
    return 0.0


def _add_goodput(report: Report, found: dict[str, list[Trial]]) -> None:
    rows = []
    goodputs = {name: [trial.goodput or 0.0 for trial in tried] for name, tried in found.items()}
    base = next(iter(goodputs.values()))
    for target, own in goodputs.items():
        times = spread(
            ours / theirs if theirs else 0.0 for ours, theirs in zip(base, own, strict=True)
        )
        report.figures[target] |= {"goodput": spread(own), "first_over_this": times}
        rows.append((target, spread(own).text(digits=3), times.text(digits=2)))
    columns = ("target", "goodput, requests/s", "the first is so many times as good")
    report.table("goodput: median (p10 to p90) of rounds", columns, rows)
