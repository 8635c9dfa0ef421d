"""Plots become files that show what they were given."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from scripts.benchmarks import plots


def test_each_plot_is_a_png_and_an_svg(tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    plots.attainment(folder, "rates", {"ours": [(0.5, 1.0), (1.0, 0.4)], "none": []}, 0.9)
    plots.distributions(folder, "times", "alone", {"ours": [0.2, 0.1]}, {"ours": [0.03, 0.01]})
    points = [plots.Point("64 x 32", 1.0, 1e9), plots.Point("64 x 32", 16.0, 9e9)]
    plots.roofline(folder, "roof", points, 4e9, 2e10)
    names = ("rates", "roof", "times")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "ours" in (folder / "rates.svg").read_text(encoding="utf-8")
    assert "64 x 32" in (folder / "roof.svg").read_text(encoding="utf-8")
