"""The wait for a place, where nobody can serve yet."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvbaton.errors import UnavailableError
from services.gateway.routing.chooser import Chooser
from services.gateway.routing.placer import Placer
from services.gateway.routing.stream import RequestStream
from tests.unit.disk_world import FakeClock


class NobodyServes:
    """Stands for a Chooser without workers."""

    routing = None
    has_place = False

    def __init__(self) -> None:
        self.num_asked = 0

    def prefillers(self) -> list[Any]:
        return []

    def choose(self, _stream: object, _tried: object) -> Any:
        self.num_asked += 1
        raise UnavailableError("no worker", retry_after_s=1)


def waiting(chooser: NobodyServes) -> tuple[Placer, asyncio.Task[Any]]:
    placer = Placer(cast(Chooser, chooser), FakeClock())
    stream = cast(RequestStream, SimpleNamespace(timeline=SimpleNamespace(num_attempts=0)))
    return placer, asyncio.create_task(placer.wait(stream, set(), 60))


async def test_news_are_looked_at() -> None:
    chooser = NobodyServes()
    placer, task = waiting(chooser)
    for num_asked in (1, 2, 3):
        await asyncio.sleep(0.01)
        assert chooser.num_asked == num_asked
        placer.on_news()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("news_first", [True, False])
async def test_a_cancel_that_comes_with_news_is_a_cancel(news_first: bool) -> None:
    """asyncio.wait_for of Python 3.11 loses it; what the request holds then stays held."""
    chooser = NobodyServes()
    placer, task = waiting(chooser)
    await asyncio.sleep(0.01)
    for act in (placer.on_news, task.cancel) if news_first else (task.cancel, placer.on_news):
        act()
    await asyncio.wait([task], timeout=1)
    was_cancelled = task.cancelled()
    task.cancel()  # else a failure would hang
    assert was_cancelled
    assert chooser.num_asked == 1
