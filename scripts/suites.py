"""A pytest plugin: the order of the suites, their time budgets, and tests that run on demand only.

scripts/test loads it. A suite is a folder of tests/; its time is that of its tests, not of imports.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

import pytest

# Seconds, in the order in which the suites run: what fails soonest comes first. All but
# cluster and packaging run beside others, which makes them slower: see scripts/test.
BUDGETS_S = {
    "unit": 360,
    "wire": 30,
    "net": 240,
    "sim": 720,
    "cluster": 600,
    "security": 150,
    "packaging": 120,
}


def suite_of(nodeid: str) -> str:
    """tests/unit/test_x.py::test_y belongs to suite unit; "" is no suite."""
    parts = PurePath(nodeid.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else ""


class Suites:
    """Adds up the time of each suite."""

    def __init__(self, *, is_long: bool) -> None:
        self._is_long = is_long
        self._times_s: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out long tests unless asked for, and put the suites in order."""
        order = {suite: place for place, suite in enumerate(BUDGETS_S)}
        left_out = [] if self._is_long else [item for item in items if _is_long(item)]
        items[:] = [item for item in items if item not in left_out]
        items.sort(key=lambda item: order.get(suite_of(item.nodeid), len(order)))
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the setup, the test and the teardown."""
        suite = suite_of(report.nodeid)
        self._times_s[suite] = self._times_s.get(suite, 0.0) + report.duration

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a run that passed, but too slowly."""
        if exitstatus == pytest.ExitCode.OK and self.over_budget():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table of times."""
        terminalreporter.section("time of each suite")
        for line in self.table():
            terminalreporter.write_line(line)

    def over_budget(self) -> list[str]:
        """The suites that took too long."""
        if self._is_long:
            return []
        return [suite for suite, time_s in self._times_s.items() if time_s > _budget_s(suite)]

    def table(self) -> Iterator[str]:
        """A line for each suite that ran."""
        slow = self.over_budget()
        for suite, time_s in self._times_s.items():
            budget = "no budget" if self._is_long else f"of {_budget_s(suite):g} s"
            verdict = "  FAILED: over its budget" if suite in slow else ""
            yield f"{suite or 'other':<10}{time_s:8.1f} s  {budget}{verdict}"


def _budget_s(suite: str) -> float:
    return BUDGETS_S.get(suite, float("inf"))


def _is_long(item: pytest.Item) -> bool:
    return item.get_closest_marker("long") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option --long."""
    parser.addoption("--long", action="store_true", help="add the tests marked long, lift budgets")


def pytest_configure(config: pytest.Config) -> None:
    """Start counting."""
    config.pluginmanager.register(Suites(is_long=config.getoption("--long")), "suites")
