"""Figures as PNG and SVG, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scripts.benchmarks.trials import Plan, Trial, pooled, rates_and_attainment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.0, 4.2)  # inches
_DPI = 150


class Point(NamedTuple):
    """A part of the arithmetic: operations for each byte that it reads, and operations a second."""

    name: str
    intensity: float
    rate: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where figures go."""
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw figures there")


def draw_trials(folder: Path, name: str, found: Mapping[str, Sequence[Trial]], plan: Plan) -> None:
    """Attainment against rate, and the distributions of TTFT and TPOT under each kind of load."""
    rates = {target: rates_and_attainment(trials) for target, trials in found.items()}
    if any(rates.values()):
        attainment(folder, f"{name}-attainment", rates, plan.share)
    titles = list(dict.fromkeys(
        load.title for trials in found.values() for trial in trials for load in trial.loads
        if not load.spec.rate or load.spec.rate in plan.rates
    ))  # fmt: skip
    for title in titles:
        slug = title.replace(" ", "-").replace(",", "")
        distributions(
            folder,
            f"{name}-{slug}",
            title,
            {target: pooled(trials, title, "ttft_s") for target, trials in found.items()},
            {target: pooled(trials, title, "tpot_s") for target, trials in found.items()},
        )


def attainment(
    folder: Path, name: str, curves: Mapping[str, Sequence[tuple[float, float]]], share: float
) -> None:
    """The share of requests within their targets, by the rate at which they came."""
    (axes,) = _figure(folder, name, 1)
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(share, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="requests a second", ylabel="within both targets", xlim=(0, None), ylim=(0, 1.03)
    )
    _finish(axes, folder, name)


def distributions(
    folder: Path,
    name: str,
    title: str,
    ttft_s: Mapping[str, Sequence[float]],
    tpot_s: Mapping[str, Sequence[float]],
) -> None:
    """The share of requests that took at most so long, for both times."""
    both = _figure(folder, name, 2)
    for axes, times, what in zip(both, (ttft_s, tpot_s), ("TTFT", "TPOT"), strict=True):
        for label, values in times.items():
            if values:
                shares = np.arange(1, len(values) + 1) / len(values)
                axes.step(np.sort(values) * 1000, shares, where="post", label=label)
        axes.set(xlabel=f"{what}, ms", ylabel=f"requests, {title}", xlim=(0, None), ylim=(0, 1.03))
    _finish(both[-1], folder, name)


def roofline(
    folder: Path, name: str, points: Sequence[Point], bytes_per_s: float, operations_per_s: float
) -> None:
    """What each part reaches below what memory and arithmetic allow."""
    (axes,) = _figure(folder, name, 1)
    reach = np.geomspace(
        min(point.intensity for point in points) / 2, max(p.intensity for p in points) * 2, 100
    )
    roof = np.minimum(reach * bytes_per_s, operations_per_s) / 1e9
    axes.loglog(reach, roof, color="black", label="measured limits")
    for part in dict.fromkeys(point.name for point in points):
        own = [point for point in points if point.name == part]
        axes.loglog(
            [p.intensity for p in own], [p.rate / 1e9 for p in own], marker="o", linestyle=":",
            label=part,
        )  # fmt: skip
    axes.set(xlabel="operations for each byte", ylabel="billion operations a second")
    _finish(axes, folder, name)


def _figure(folder: Path, name: str, columns: int) -> list[Axes]:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    width, height = _SIZE
    figure = Figure(figsize=(width * (1 + (columns - 1) * 0.6), height), layout="constrained")
    figure.suptitle(name)
    return list(figure.subplots(1, columns, squeeze=False)[0])


def _finish(axes: Axes, folder: Path, name: str) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    for each in figure.axes:
        each.grid(alpha=0.3)
    axes.legend(fontsize="small")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=_DPI)
