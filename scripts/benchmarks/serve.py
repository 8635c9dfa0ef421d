"""One server under load: alone, some at once, at rates, and the highest rate within its targets.

Requests of an open load come at random moments (Poisson) or as in a trace, whatever becomes of
those before; their times count from the moment at which they were to be sent. Every prompt is new
in every run. A load's processes are counted: the generator's, which is one of its own, together
with this one, and those of the cluster.

The cluster is kvbaton's, started here, unless --url names a server that runs. For the other servers
see compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator

from scripts.benchmarks import engines, plots, targets, trials
from scripts.benchmarks.report import Report, report_of
from scripts.benchmarks.servers import Setting
from scripts.benchmarks.trial_tables import (
    add_bound,
    add_short_loads,
    add_tables,
    goodput_text,
)
from scripts.benchmarks.trials import Plan, Trial, Trials, last_of, make_plan

_URL_VOCAB = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    targets.add_options(parser)
    add("--url", help="load this server, such as http://127.0.0.1:8000")
    add("--vocab", type=int, help="tokens that prompts are made of (default: the model's)")
    add("--mode", choices=("disaggregated", "colocated"), default="disaggregated")
    add("--workers", type=int, metavar="N", help="colocated workers (default: one for each core)")
    add("--set", default="", metavar="SETTINGS", help="such as decode.max_num_seqs=32,store.X=Y")
    add("--rounds", type=int, default=1, help="everything this often (default: 1)")
    trials.add_options(parser)
    plots.add_options(parser)


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    target = _target(options)
    found: list[Trial] = []
    with targets.setting_of(options, num_colocated=options.workers) as setting:
        model_vocab = _URL_VOCAB if options.url else engines.vocab_of(setting.model)
        plan = make_plan(options, options.vocab or model_vocab)
        report = report_of(
            _rounds(found, plan, setting, target, options.rounds),
            lambda: _report(options, plan, setting, target, found),
            options.json,
        )
    if options.plots is not None:
        plots.draw_trials(options.plots, "serve", {target: found}, plan)
    return report


def _target(options: argparse.Namespace) -> str:
    if options.url is not None:
        return f"url={options.url}"
    kind = "kvbaton-colocated" if options.mode == "colocated" else "kvbaton"
    return f"{kind}:{options.set}" if options.set else kind


def _rounds(
    found: list[Trial], plan: Plan, setting: Setting, target: str, count: int
) -> Generator[None, None, None]:
    with targets.server(target, setting) as served:
        for number in range(1, count + 1):
            before = found[-1].goodput if found else None
            one = Trials(f"{target}, round {number} of {count}", plan, served)
            found.append(one.trial)
            one.run(before)
            yield


def _report(
    options: argparse.Namespace, plan: Plan, setting: Setting, target: str, found: list[Trial]
) -> Report:
    report = Report(
        "serve",
        {
            "target": target,
            "model": engines.name_of(options),
            "mix": plan.mix,
            "cores": setting.cores,
            "targets": str(found[0].targets) if found else None,
            "requests": plan.num_requests,
        },
    )
    report.figures["rounds"] = [trial.figures() for trial in found]
    for number, trial in enumerate(found, 1):
        add_tables(report, f"round {number}, {trial.targets}", trial)
    if plan.is_goodput and (last := last_of(found)):
        report.note(goodput_text([trial.goodput for trial in found], plan.precision))
        add_short_loads(report, "last round", last, plan.precision)
        num_prefill = options.prefill if options.mode == "disaggregated" else len(setting.cores)
        add_bound(report, last, num_prefill, len(setting.cores))
    return report
