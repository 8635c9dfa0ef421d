"""Servers that all run at once and are under load one at a time, each with the same arrivals.

A machine that changes its speed for minutes changes it for all of them, as none waits for another's
whole round, start and stop. It takes servers that use nothing while they have nothing to do:
kvbaton's own, by what compare calls them (kvbaton, kvbaton-colocated, with settings). The first is
what the others are compared with, and what --ttft 3x is a multiple of.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Mapping
from contextlib import ExitStack

from scripts.benchmarks import engines, targets, trials
from scripts.benchmarks.attainment import Targets
from scripts.benchmarks.loads import Load
from scripts.benchmarks.report import Report, report_of
from scripts.benchmarks.servers import Setting
from scripts.benchmarks.trials import Plan, Trials, make_plan

_ALONE = 3  # requests: what the target is a multiple of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    add("target", nargs="+", help="what to alternate; see above")
    targets.add_options(parser)
    add("--rounds", type=int, default=6, help="of each rate (default: 6)")
    trials.add_open_options(parser)
    parser.set_defaults(
        rate=[1.0], closed=[1], closed_requests=_ALONE, burst=[], goodput=False, precision=0.0
    )


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    if len(set(options.target)) < len(options.target):
        raise SystemExit("alternate: name no target twice")
    tried: dict[str, Trials] = {}
    with targets.setting_of(options) as setting:
        plan = make_plan(options, engines.vocab_of(setting.model))
        return report_of(
            _rounds(options.target, tried, plan, setting, options.rounds),
            lambda: _report(options, plan, setting, tried),
            options.json,
        )


def _rounds(
    names: list[str], tried: dict[str, Trials], plan: Plan, setting: Setting, count: int
) -> Generator[None, None, None]:
    with ExitStack() as running:
        for name in names:
            served = running.enter_context(targets.server(name, setting))
            first = next(iter(tried.values()), None)
            fixed = first.trial.targets if first else None
            tried[name] = Trials(name, plan, served, fixed)
            tried[name].begin()
        for number in range(count):
            for rate in plan.rates:
                for name in names[:: -1 if number % 2 else 1]:
                    tried[name].open(rate, plan.seed + number)
            yield


def _report(
    options: argparse.Namespace,
    plan: Plan,
    setting: Setting,
    tried: Mapping[str, Trials],
) -> Report:
    wanted = next((each.trial.targets for each in tried.values()), None)
    report = Report(
        "alternate",
        {
            "model": engines.name_of(options),
            "mix": plan.mix,
            "cores": setting.cores,
            "targets": str(wanted) if wanted else None,
            "requests": plan.num_requests,
        },
    )
    columns = (
        "target", "within, % of each", "of all", "TTFT, ms", "TPOT, ms", "worst gap, ms",
    )  # fmt: skip
    for rate in plan.rates:
        loads_of = {
            name: [load for load in each.trial.loads if load.spec.rate == rate]
            for name, each in tried.items()
        }
        done = {name: loads for name, loads in loads_of.items() if loads}
        if wanted is None or not done:
            continue
        rows = [_row(name, loads, wanted) for name, loads in done.items()]
        report.table(f"{rate:g} a second; times are p50/p90 of all", columns, rows)
        for name, loads in done.items():
            figures = [load.figures(wanted) for load in loads]
            report.figures[f"{name}, {rate:g} a second"] = figures
    return report


def _row(name: str, loads: list[Load], wanted: Targets) -> tuple[str, ...]:
    shares = [load.attainment(wanted) for load in loads]
    every = Load("", loads[0].spec, [outcome for load in loads for outcome in load.outcomes])
    times = (every.percentiles(of)[:2] for of in ("ttft_s", "tpot_s", "worst_gap_s"))
    return (
        name,
        ", ".join(f"{share * 100:.0f}" for share in shares),
        f"{sum(shares) / len(shares):.1%}",
        *("/".join(f"{value * 1000:.0f}" for value in each) for each in times),
    )
