"""Bugs planted in the services' own code: the simulation must catch each, and nothing without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sim import planted_deaths  # noqa: F401 - it adds to the bugs
from tests.sim.farm import asked_for, farmed
from tests.sim.planted import BUGS, Catcher, Live
from tests.sim.scenario import run_seed
from tests.sim.test_seeds import NUM_SEEDS

pytestmark = pytest.mark.usefixtures("quiet")

DOCUMENT = Path(__file__).parents[2] / "docs" / "planted-bugs.md"


def mode_of(seed: int) -> str:
    return "liveness" if isinstance(seed, Live) else "safety"


def is_caught(catcher: Catcher) -> bool:
    if isinstance(catcher, int):
        return bool(run_seed(catcher, mode_of(catcher)).broken)
    try:
        catcher()
    except Exception:
        return True
    return False


def caught_with_and_without(name: str) -> tuple[bool, bool]:
    """Whether what is to catch the bug does, and whether it does so where there is none."""
    catcher, planted = BUGS[name]
    with planted():
        with_it = is_caught(catcher)
    if isinstance(catcher, int) and catcher < NUM_SEEDS:
        return with_it, False  # test_seeds.py runs it as it is
    return with_it, is_caught(catcher)


@pytest.fixture(scope="module")
def is_seen(request: pytest.FixtureRequest) -> Iterator[Callable[[str], tuple[bool, bool]]]:
    with farmed(caught_with_and_without, asked_for(request, "is_seen", "name")) as is_seen:
        yield is_seen


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, is_seen: Callable[[str], tuple[bool, bool]]) -> None:
    assert is_seen(name) == (True, False)


def test_the_document_lists_every_bug_with_who_catches_it() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.count("|") == 4]
    listed = {row[1].strip(): row[3].strip() for row in rows[2:]}
    assert sorted(listed) == sorted(BUGS)
    for name, (catcher, _) in BUGS.items():
        who = f"{mode_of(catcher)} seed {int(catcher)}" if isinstance(catcher, int) else "scenario"
        assert listed[name].split(";")[0] == who
