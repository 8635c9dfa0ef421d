"""A worker joins with an engine that has given a token, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from common.config import StartError
from common.engine.mock import MOCK_VOCAB_SIZE, MockEngine
from common.engine.work import Sampled, Work
from common.worker.self_test import self_test
from kvbaton.errors import UnprocessableError


class Broken(MockEngine):
    """Its step does what a test wants."""

    def __init__(self, result: Sampled | Exception | None, error: str = "") -> None:
        super().__init__(0.0, 0.0)
        self._result = result
        self._error = error

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        if isinstance(self._result, Exception):
            raise self._result
        if self._error:
            works[0].error = UnprocessableError(self._error)
        return [self._result]


async def test_what_the_engine_raises_is_raised() -> None:
    """It may be for a moment only, as when memory has run out: another start may go well."""
    with pytest.raises(MemoryError):
        await self_test(Broken(MemoryError()))


async def test_an_engine_that_computes_passes() -> None:
    await self_test(MockEngine(0.0, 0.0))


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Broken(None), "gave no token"),
        (Broken(None, "NaN"), "gave no token: NaN"),
        (Broken(Sampled(MOCK_VOCAB_SIZE, 0.0)), f"token {MOCK_VOCAB_SIZE}, which is not"),
    ],
)
async def test_an_engine_that_does_not_is_refused_in_words(engine: Broken, reason: str) -> None:
    with pytest.raises(StartError, match=reason):
        await self_test(engine)
