"""Tables of what servers did under load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scripts.benchmarks.attainment import Targets
from scripts.benchmarks.loads import Load
from scripts.benchmarks.measure import spread
from scripts.benchmarks.queueing import rate_bound
from scripts.benchmarks.report import Report
from scripts.benchmarks.trials import Trial

_COLUMNS = (
    "load", "done/s", "tokens/s", "TTFT, ms", "TPOT, ms", "worst gap, ms", "E2E, s", "within",
)  # fmt: skip


def add_tables(report: Report, title: str, trial: Trial) -> None:
    """All that a trial's loads tell."""
    if trial.loads:
        _add_loads(report, title, trial)
        _add_shares(report, title, trial)
        _add_overheads(report, title, trial)


def _add_loads(report: Report, title: str, trial: Trial) -> None:
    """A table with a row for each load, and what went wrong."""
    rows = [_row(load, trial.targets) for load in trial.loads]
    report.table(f"{title}; times are p50/p90", _COLUMNS, rows)
    for load in trial.loads:
        for error in load.figures(None)["errors"]:
            report.note(f"{title}, {load.title}: {error}")


def _row(load: Load, targets: Targets | None) -> tuple[str, ...]:
    figures = load.figures(targets)
    within = "" if targets is None else f"{'<' * load.is_lost}{load.attainment(targets):.0%}"
    step = figures["step_s"]
    return (
        load.title if step is None else f"{load.title}, a step {step * 1000:.1f} ms",
        f"{figures['requests_per_s']:.2f}",
        f"{figures['tokens_per_s']:.0f}",
        _pair(load, "ttft_s", 1000, 0),
        _pair(load, "tpot_s", 1000, 1),
        _pair(load, "worst_gap_s", 1000, 0),
        _pair(load, "e2e_s", 1, 2),
        within,
    )


def _pair(load: Load, name: str, scale: float, digits: int) -> str:
    return "/".join(f"{value * scale:.{digits}f}" for value in load.percentiles(name)[:2])


def _add_shares(report: Report, title: str, trial: Trial) -> None:
    """How much of a core the load, each of the server's processes and all else took, and how late
    requests were sent."""
    names = list(trial.loads[0].server_shares)
    rows = [
        (
            load.title,
            f"{load.percentiles('late_s')[2] * 1000:.1f}",
            f"{load.generator_share:.1%}",
            *(f"{load.server_shares[name]:.1%}" for name in names),
            _percent(load.others_share),
        )
        for load in trial.loads
    ]
    columns = ("load", "late p99, ms", "generator", *names, "all else")
    report.table(f"{title}: shares of a core", columns, rows)


def _add_overheads(report: Report, title: str, trial: Trial) -> None:
    """What is not arithmetic: see Load."""
    names = list(trial.loads[0].overheads)
    if not names:
        return
    rows = [
        (
            load.title,
            *(_percent(load.overheads[name]) for name in names),
            _percent(load.control_share),
        )
        for load in trial.loads
    ]
    columns = ("load", *names, "gateway and store: of a core, at 100 tokens/s")
    report.table(f"{title}: of a busy worker's time, what is not arithmetic", columns, rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def add_bound(report: Report, trial: Trial, num_prefill: int, num_cores: int) -> None:
    """The rate at which random arrivals alone, before the prompts' computation, use up the targets.

    `num_prefill` cores that only prefill, and all `num_cores` pooled: see queueing.rate_bound. None
    is shown for a trial that was ended before it had targets.
    """
    targets = trial.targets
    if targets is None:
        return
    service_s = trial.unloaded_ttft_s
    for text, cores in (
        (f"{num_prefill} prefill core(s)", num_prefill),
        (f"{num_cores} cores pooled, decoding left out", num_cores),
    ):
        bound = rate_bound(service_s, targets.ttft_s, targets.share, cores)
        report.figures.setdefault("queueing_bound", {})[text] = bound
        reached = ""
        if trial.goodput is not None and bound:
            reached = f"; reached {trial.goodput / bound:.0%}"
        report.note(
            f"queueing bound, {text}: {bound:.2f} requests/s (M/D/1, Erlang's waiting time; "
            f"{service_s * 1000:.0f} ms of prefill, {targets.share:.0%} of wait and prefill within "
            f"{targets.ttft_s:.3g} s{reached})"
        )


def add_short_loads(report: Report, title: str, trial: Trial, precision: float) -> None:
    """Warn where loads were so short that a line before the server could pass for goodput."""
    goodput, kept_up = trial.goodput, trial.kept_up
    if goodput and kept_up and goodput > (1 + precision) * kept_up:
        count = trial.loads[-1].spec.count
        report.note(
            f"{title}: {count} requests come within {count / goodput:.0f} s, in which a line can "
            f"grow that is still within the target. Without end the server may keep up only "
            f"{kept_up:.3g} requests/s; more --requests tell"
        )


def add_goodputs(
    report: Report, goodputs: Mapping[str, Sequence[float | None]], precision: float
) -> None:
    """What was found of each server in each round, beside the first."""
    rows = []
    base = next(iter(goodputs.values()))
    for target, own in goodputs.items():
        pairs = in_both(own, base)
        if not pairs:
            continue
        report.note(f"{target}: {goodput_text(own, precision)}")
        goodput = spread(mine for mine, _ in pairs)
        figures = report.figures.setdefault(target, {})
        figures["goodput"] = goodput
        ratios = [its / mine for mine, its in pairs if mine]  # nothing is so many times nothing
        if ratios:
            figures["first_over_this"] = spread(ratios)
        times = spread(ratios).text(digits=2) if ratios else ""
        rows.append((target, goodput.text(digits=3), times))
    columns = ("target", "goodput, requests/s", "the first is so many times as good")
    report.table("goodput: median (p10 to p90) of rounds", columns, rows)


def in_both(own: Sequence[float | None], base: Sequence[float | None]) -> list[tuple[float, float]]:
    """The figures of each round that has both: one that was ended early may lack them."""
    pairs = zip(own, base, strict=False)
    return [(mine, its) for mine, its in pairs if mine is not None and its is not None]


def goodput_text(goodputs: Sequence[float | None], precision: float) -> str:
    """What was found in each round."""
    found = ", ".join(f"{goodput:.3g}" for goodput in goodputs if goodput is not None)
    return (
        f"goodput {found} requests/s (bisection to {precision:.0%}, met once more in its own run)"
    )
