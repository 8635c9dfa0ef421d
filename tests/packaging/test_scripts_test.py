"""scripts/test and scripts/check: order, budgets, long tests, and an honest exit status."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys
import pytest
import scripts.suites

scripts.suites.BUDGETS_S["unit"] = float(sys.argv[1])
sys.exit(pytest.main(["-p", "scripts.suites", *sys.argv[2:]]))
"""

TESTS = """
import pytest

def test_short():
    pass

@pytest.mark.long
def test_long():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with a test of each kind in two suites."""
    for suite in ("packaging", "unit"):
        (tmp_path / "tests" / suite).mkdir(parents=True)
        (tmp_path / "tests" / suite / f"test_{suite}.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long\n")
    return tmp_path


def run(folder: Path, budget_s: float, *arguments: str) -> tuple[int, str]:
    """Exit status and output of scripts/test's plugin, with T for every time."""
    command = [sys.executable, "-c", DRIVER, str(budget_s), "-p", "no:cacheprovider"]
    environ = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True
    )
    text, _ = process.communicate()
    return process.returncode, re.sub(r"(?m)^(unit|packaging) +[0-9.]+ s", r"\1 T s", text)


def test_suites_run_in_order_and_long_tests_only_on_demand(folder: Path) -> None:
    status, text = run(folder, 150, "-v")
    assert status == 0
    assert text.index("test_unit.py::test_short") < text.index("test_packaging.py::test_short")
    assert "test_long" not in text
    assert "unit T s  of 150 s\npackaging T s  of 120 s\n" in text
    assert "2 passed, 2 deselected" in text.splitlines()[-1]


def test_a_suite_over_its_budget_fails_the_run(folder: Path) -> None:
    status, text = run(folder, 0)
    assert status == 1
    assert "unit T s  of 0 s  FAILED: over its budget\n" in text
    assert "packaging T s  of 120 s\n" in text


def test_long_adds_tests_and_lifts_budgets(folder: Path) -> None:
    status, text = run(folder, 0, "--long")
    assert status == 0
    assert "unit T s  no budget\n" in text
    assert "4 passed" in text.splitlines()[-1]


@pytest.mark.parametrize("failing", [[], ["mypy"], ["ruff", "lint-imports"]])
def test_every_check_runs_and_each_failure_counts(tmp_path: Path, failing: list[str]) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/check", tmp_path / "scripts/check")
    for path in ("scripts/setup", ".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/lint-imports"):
        tool = tmp_path / path
        tool.write_text(f"#!/bin/sh\necho {tool.name} says why\nexit {int(tool.name in failing)}\n")
        tool.chmod(0o755)
    process = subprocess.Popen([tmp_path / "scripts/check"], stdout=subprocess.PIPE, text=True)
    lines = process.communicate()[0].splitlines()
    assert process.returncode == int(bool(failing))
    for check in ("ruff format", "ruff check", "mypy", "lint-imports"):
        tool_name = check.partition(" ")[0]
        assert f"{'FAILED' if tool_name in failing else 'ok':<8}{check}" in lines
        assert (f"{tool_name} says why" in lines) == (tool_name in failing)
