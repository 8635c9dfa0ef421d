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
import tempfile
from pathlib import Path

from scripts.benchmarks import engines, plots, targets, trials
from scripts.benchmarks.measure import all_cores
from scripts.benchmarks.report import Report
from scripts.benchmarks.servers import Setting
from scripts.benchmarks.trial_tables import add_bound, add_loads, add_shares, goodput_text
from scripts.benchmarks.trials import Plan, Trial, Trials, core_list, make_plan

_URL_VOCAB = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    engines.add_model_options(parser)
    add("--url", help="load this server, such as http://127.0.0.1:8000")
    add("--vocab", type=int, help="tokens that prompts are made of (default: the model's)")
    add("--mode", choices=("disaggregated", "colocated"), default="disaggregated")
    add("--prefill", type=int, default=1, metavar="N", help="prefill workers (default: 1)")
    add("--decode", type=int, default=1, metavar="N", help="decode workers (default: 1)")
    add("--workers", type=int, metavar="N", help="colocated workers (default: one for each core)")
    add("--cores", help="cores of the cluster, such as 0,1 (default: all)")
    add("--set", default="", metavar="SETTINGS", help="such as decode.max_num_seqs=32,store.X=Y")
    add("--rounds", type=int, default=1, help="everything this often (default: 1)")
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
            num_colocated=options.workers,
        )
        vocab = options.vocab or (_URL_VOCAB if options.url else engines.vocab_of(model))
        plan = make_plan(options, vocab)
        target = f"url={options.url}"
        if options.url is None:
            kind = "kvbaton-colocated" if options.mode == "colocated" else "kvbaton"
            target = f"{kind}:{options.set}" if options.set else kind
        found: list[Trial] = []
        with targets.server(target, setting) as served:
            for _ in range(options.rounds):
                start = found[-1].goodput if found else None
                found.append(Trials(plan, served).run(start))
    return _report(options, plan, setting, target, found)


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
            "targets": str(found[0].targets),
            "requests": plan.num_requests,
        },
    )
    report.figures["rounds"] = [trial.figures() for trial in found]
    for number, trial in enumerate(found, 1):
        title = f"round {number}, {trial.targets}"
        add_loads(report, title, trial)
        add_shares(report, title, trial)
    if plan.is_goodput:
        report.note(goodput_text(found, plan.precision))
        num_prefill = options.prefill if options.mode == "disaggregated" else len(setting.cores)
        add_bound(report, found[-1], num_prefill, len(setting.cores))
    if options.plots is not None:
        plots.draw_trials(options.plots, "serve", {target: found}, plan)
    return report
