"""Workers that go on where others died, step by step: scenarios for test_zombies.py, and for the
planted bugs that seeds seldom meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.engine.mock import MOCK_LAYOUT, mock_output
from services.decode.worker import DecodeRole
from tests.sim.cluster import Shape, SimCluster, output_of, simulate, until
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size


def a_successor_finds_a_damaged_block() -> None:
    """It cannot go on from that one: what follows is computed anew, not tried for ever."""

    async def main() -> None:
        shape = Shape(num_decode=2, mover="zmq")
        async with SimCluster(World(1), shape) as cluster:
            prompt = [5] * (4 * BLOCK)
            stream = cluster.submit(prompt, 100)
            await until(lambda: len(stream.tokens) > 2 * BLOCK)
            (handoff,) = cluster.ledgers()[0].handoffs.values()
            block = handoff.blocks[4]  # the first that decode has filled
            arena = cluster.stores[0]._memory.arena
            arena[block * MOCK_LAYOUT.block_bytes] ^= 1
            name = stream.timeline.decode_worker
            (decode,) = (each for each in cluster.of_role(DecodeRole) if each.config.name == name)
            await cluster.kill(decode)
            async with asyncio.timeout(5):
                assert await output_of(stream) == mock_output(prompt, 100)
            assert cluster.stores[0].num_corrupt == 1
            await cluster.settle()

    simulate(main())


SCENARIOS: list[Callable[[], None]] = [a_successor_finds_a_damaged_block]
