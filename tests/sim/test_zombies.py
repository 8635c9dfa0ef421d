"""Members that are taken for dead and are not: see zombies.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.zombies import SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_zombies(scenario: Callable[[], None]) -> None:
    scenario()
