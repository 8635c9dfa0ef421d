"""Members that are taken for dead and are not (zombies.py), and who goes on in the place of those
that are (successors.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim import successors, zombies


@pytest.mark.parametrize(
    "scenario", [*zombies.SCENARIOS, *successors.SCENARIOS], ids=lambda scenario: scenario.__name__
)
def test_zombies(scenario: Callable[[], None]) -> None:
    scenario()
