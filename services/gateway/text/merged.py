"""Several generations, read as one sequence."""

from __future__ import annotations

import asyncio
from typing import Self

from services.gateway.text.generation import Generation, TextToken

_MAX_QUEUED = 256


class Merged:
    """The tokens of all generations as they come, each with its generation's number.

    `num` generations are to be added, some of them perhaps while others are read. Iteration raises
    what one of them raises; `close` must be called, and cancels what still runs.
    """

    def __init__(self, num: int) -> None:
        self._num_running = num
        self._generations: list[Generation] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, TextToken] | Exception] = asyncio.Queue(_MAX_QUEUED)

    def add(self, number: int, generation: Generation) -> None:
        self._generations.append(generation)
        pump = asyncio.create_task(self._pump(number, generation), name=f"choice-{number}")
        self._pumps.append(pump)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TextToken]:
        if not self._num_running:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        self._num_running -= item[1].finish_reason is not None
        return item

    async def _pump(self, number: int, generation: Generation) -> None:
        try:
            async for token in generation:
                await self._queue.put((number, token))
        except Exception as error:  # raised again by whoever reads the queue
            await self._queue.put(error)

    async def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        for generation in self._generations:
            generation.cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
