"""What several files of the simulation's tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from tests.sim.farm import silence


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Only reports speak."""
    former = structlog.get_config()
    silence()
    yield
    structlog.configure(**former)
