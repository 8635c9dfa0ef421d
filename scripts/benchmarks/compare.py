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
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

from scripts.benchmarks import engines, plots, targets, trials
from scripts.benchmarks.attainment import Targets
from scripts.benchmarks.measure import spread
from scripts.benchmarks.report import Report, report_of
from scripts.benchmarks.servers import Setting
from scripts.benchmarks.trial_tables import (
    add_bound,
    add_goodputs,
    add_short_loads,
    add_tables,
    in_both,
)
from scripts.benchmarks.trials import Plan, Trial, Trials, last_of, make_plan

Found = Mapping[str, list[Trial]]  # one trial a round, by target


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    add("target", nargs="+", help="what to compare; see above")
    targets.add_options(parser)
    add("--rounds", type=int, default=3, help="of each target (default: 3)")
    add("--vllm-venv", type=Path, metavar="DIR", help="virtual environment with vLLM")
    add("--llama-venv", type=Path, metavar="DIR", help="one with llama-cpp-python and gguf")
    trials.add_options(parser)
    plots.add_options(parser)


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    venvs = {"vllm_venv": options.vllm_venv, "llama_venv": options.llama_venv}
    found: Found = {name: [] for name in options.target}
    with targets.setting_of(options, **venvs) as setting:
        plan = make_plan(options, engines.vocab_of(setting.model))
        report = report_of(
            _rounds(found, plan, setting, options.rounds),
            lambda: _report(options, plan, setting, found),
            options.json,
        )
    if options.plots is not None:
        plots.draw_trials(options.plots, "compare", found, plan)
    return report


def _rounds(found: Found, plan: Plan, setting: Setting, count: int) -> Generator[None, None, None]:
    names = list(found)
    fixed: Targets | None = None
    for number in range(count):
        first = number % len(names)
        in_round = replace(plan, seed=plan.seed + 1000 * number)
        for name in names[first:] + names[:first]:
            before = found[name][-1].goodput if found[name] else None
            title = f"{name}, round {number + 1} of {count}"
            with targets.server(name, setting) as served:
                one = Trials(title, in_round, served, fixed)
                found[name].append(one.trial)
                one.run(before)
            fixed = fixed or one.trial.targets
        yield


def _report(options: argparse.Namespace, plan: Plan, setting: Setting, found: Found) -> Report:
    first, *_ = found.values()
    report = Report(
        "compare",
        {
            "model": engines.name_of(options),
            "mix": plan.mix,
            "cores": setting.cores,
            "targets": str(first[0].targets) if first else None,
            "requests": plan.num_requests,
            "rounds": min(sum(trial.is_whole for trial in tried) for tried in found.values()),
        },
    )
    for name, tried in found.items():
        report.figures[name] = {"rounds": [trial.figures() for trial in tried]}
        if last := last_of(tried):
            add_tables(report, f"{name}, last round", last)
    base = last_of(first)
    if base is None:
        return report
    for load in base.loads:
        if not load.spec.rate or load.spec.rate in plan.rates:
            _add_figures(report, found, load.title)
    if plan.is_goodput:
        goodputs = {name: [trial.goodput for trial in tried] for name, tried in found.items()}
        add_goodputs(report, goodputs, plan.precision)
        for name, tried in found.items():
            if last := last_of(tried):
                add_short_loads(report, f"{name}, last round", last, plan.precision)
        add_bound(report, base, options.prefill, len(setting.cores))
    return report


def _add_figures(report: Report, found: Found, title: str) -> None:
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
            pairs = in_both(own[name], base[name])
            if not pairs:
                cells += ["", ""]
                continue
            ratio = spread(mine / its for mine, its in pairs)
            cells += [spread(mine for mine, _ in pairs).text(scale, digits), f"{ratio.median:.2f}"]
            report.figures[target][f"{title}, {name}, ratio"] = ratio
        rows.append(tuple(cells))
    columns = (
        "target", "done/s", "ratio", "TTFT p50, ms", "ratio", "TPOT p50, ms", "ratio",
        "step, ms", "ratio",
    )  # fmt: skip
    report.table(f"{title}: median (p10 to p90) of rounds, ratio to the first", columns, rows)


def _figure(trial: Trial, title: str, name: str) -> float | None:
    """Of the load with that title; None where there is no such figure, or no such load."""
    for load in trial.loads:
        if load.title == title:
            figures = load.figures(None)
            return (figures[name] if name in figures else load.percentiles(name)[0]) or None
    return None
