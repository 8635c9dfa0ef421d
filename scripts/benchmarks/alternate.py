"""Servers that all run at once and are under load one at a time, each with the same arrivals.

A machine that changes its speed for minutes changes it for all of them, as none waits for another's
whole round, start and stop. It takes servers that use nothing while they have nothing to do:
kvbaton's own, by what compare calls them (kvbaton, kvbaton-colocated, with settings). The first is
what the others are compared with, and what --ttft 3x is a multiple of. With --goodput each round
has a search for each server, and the searches go on in turn, a load at a time.
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
from scripts.benchmarks.trial_tables import add_bound, add_goodputs, add_short_loads
from scripts.benchmarks.trials import Plan, Trials, make_plan

_ENDED = object()
_ALONE = 3  # requests: what the target is a multiple of


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this case."""
    add = parser.add_argument
    add("target", nargs="+", help="what to alternate; see above")
    targets.add_options(parser)
    add("--rounds", type=int, default=6, help="of each rate, or search (default: 6)")
    trials.add_open_options(parser)
    parser.set_defaults(closed=[1], closed_requests=_ALONE, burst=[])


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    if len(set(options.target)) < len(options.target):
        raise SystemExit("alternate: name no target twice")
    if not (options.rate or options.goodput):
        raise SystemExit("alternate: give --rate or --goodput")
    tried: dict[str, Trials] = {}
    goodputs: dict[str, list[float]] = {name: [] for name in options.target}
    with targets.setting_of(options) as setting:
        plan = make_plan(options, engines.vocab_of(setting.model))
        return report_of(
            _rounds(tried, goodputs, plan, setting, options.rounds),
            lambda: _report(options, plan, setting, tried, goodputs),
            options.json,
        )


def _rounds(
    tried: dict[str, Trials],
    goodputs: dict[str, list[float]],
    plan: Plan,
    setting: Setting,
    count: int,
) -> Generator[None, None, None]:
    with ExitStack() as running:
        for name in goodputs:
            served = running.enter_context(targets.server(name, setting))
            first = next(iter(tried.values()), None)
            fixed = first.trial.targets if first else None
            tried[name] = Trials(name, plan, served, fixed)
            tried[name].begin()
        for number in range(count):
            names = list(tried)[:: -1 if number % 2 else 1]
            for rate in plan.rates:
                for name in names:
                    tried[name].open(rate, plan.seed + number)
            if plan.is_goodput:
                _search({name: tried[name] for name in names}, plan.seed + 1000 * number)
                for name, each in tried.items():
                    goodputs[name].append(each.trial.goodput or 0.0)
            yield


def _search(tried: Mapping[str, Trials], seed: int) -> None:
    """One search for each, a load of each in turn."""
    searches = [each.find_goodput(each.trial.goodput, seed) for each in tried.values()]
    while searches:
        searches = [search for search in searches if next(search, _ENDED) is not _ENDED]


def _report(
    options: argparse.Namespace,
    plan: Plan,
    setting: Setting,
    tried: Mapping[str, Trials],
    goodputs: Mapping[str, list[float]],
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
    if plan.is_goodput and tried:
        for name, each in tried.items():
            report.figures[name] = {**each.trial.figures(), "goodputs": goodputs[name]}
        add_goodputs(report, goodputs, plan.precision)
        for name, each in tried.items():
            add_short_loads(report, f"{name}, last round", each.trial, plan.precision)
        base = next(iter(tried.values()))
        add_bound(report, base.trial, options.prefill, len(setting.cores))
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
