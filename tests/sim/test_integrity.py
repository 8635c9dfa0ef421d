"""Blocks that travel: only what is missing, and never with other bytes than were sent."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import Discard, GetBlocks, PutBlocks
from kvbaton.errors import UnavailableError
from services.decode.worker import DecodeRole
from tests.sim.cluster import DATA, Shape, SimCluster, listen, output_of, simulate
from tests.sim.disturbances import Flip
from tests.sim.world import World

BLOCK = MOCK_LAYOUT.block_size


def test_what_a_worker_already_holds_is_not_pulled_again() -> None:
    """The second turn of a conversation: its beginning is the first turn and the answer."""

    async def main() -> None:
        async with SimCluster(World(1), Shape(mover="zmq")) as cluster:
            pulled: list[tuple[int, int]] = []
            (decode,) = cluster.of_role(DecodeRole)

            def on_get(pipe: object, message: GetBlocks) -> None:
                dealer = getattr(pipe, "dealer", None)
                role = "decode" if dealer is not None and dealer.pid == decode.seams.pid else ""
                pulled.extend((role == "decode", index) for index in message.indexes)

            listen(cluster.world.network, GetBlocks, on_get)
            first = [5] * (4 * BLOCK + 3)
            answer = await output_of(cluster.submit(first, 2 * BLOCK))
            assert answer == mock_output(first, 2 * BLOCK)
            assert sorted(pulled) == [(True, index) for index in range(5)]
            pulled.clear()
            second = [*first, *answer, *[7] * BLOCK]
            stream = cluster.submit(second, 5)
            assert await output_of(stream) == mock_output(second, 5)
            num_cached = stream.num_cached_tokens // BLOCK
            assert num_cached == 6  # all that was computed: 4 * BLOCK + 3 + 2 * BLOCK - 1 positions
            num_blocks = len(second) // BLOCK + 1
            by_decode = [index for is_decode, index in pulled if is_decode]
            by_prefill = [index for is_decode, index in pulled if not is_decode]
            assert by_decode == list(range(num_cached, num_blocks))
            # Prefill wrote the first four itself; decode wrote the next.
            assert by_prefill == list(range(4, num_cached))
            await cluster.settle()

    simulate(main())


def test_flipped_bytes_are_found_out_dropped_counted_and_computed_again() -> None:
    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, mover="zmq")
        async with SimCluster(World(1), shape) as cluster:
            num_puts = num_discards = 0

            def on_put(_pipe: object, _message: PutBlocks) -> None:
                nonlocal num_puts
                num_puts += 1

            def on_discard(_pipe: object, message: Discard) -> None:
                nonlocal num_discards
                num_discards += len(message.indexes)

            network = cluster.world.network
            listen(network, PutBlocks, on_put)
            listen(network, Discard, on_discard)
            flip = Flip(lambda pipe: pipe.dealer.endpoint in DATA, rng=random.Random(1), share=0.2)
            network.begin(flip)
            for number in range(30):
                prompt = [number % 7 + 5] * (3 * BLOCK) + [number] * 5
                stream = cluster.submit(prompt, 20)
                with suppress(UnavailableError):  # tried too often
                    assert await output_of(stream) == mock_output(prompt, 20)
            network.end(flip)
            assert flip.num_struck > 20
            assert num_discards > 3
            (store,) = cluster.stores
            assert store.broker is not None
            # Two workers may find out the same block, and one may be too late to tell.
            assert 3 < store.broker.num_corrupt <= num_discards
            num_refused = store.num_corrupt - store.broker.num_corrupt
            assert num_refused > 3
            assert num_refused + num_discards == flip.num_struck  # each was noticed
            stream = cluster.submit([5] * 40, 5)
            assert await output_of(stream) == mock_output([5] * 40, 5)
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("num_wanted", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_digest_is_wrong_by_itself(num_wanted: int) -> None:
    """Of so many blocks on their way not one is taken for another."""

    async def main() -> None:
        shape = Shape(num_prefill=2, num_decode=2, mover="zmq", num_blocks=200)
        async with SimCluster(World(1), shape) as cluster:
            num_blocks = 0

            def on_get(_pipe: object, message: GetBlocks) -> None:
                nonlocal num_blocks
                num_blocks += len(message.indexes)

            listen(cluster.world.network, GetBlocks, on_get)
            rng = random.Random(1)
            while num_blocks < num_wanted:
                prompts = [[rng.randrange(5, 9)] * rng.randrange(20, 900) for _ in range(8)]
                streams = [cluster.submit(prompt, 3) for prompt in prompts]
                for prompt, stream in zip(prompts, streams, strict=True):
                    assert await output_of(stream) == mock_output(prompt, 3)
            assert [store.num_corrupt for store in cluster.stores] == [0]
            await cluster.settle()

    simulate(main())


def test_a_salt_and_a_tenant_keep_their_blocks_to_themselves() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape()) as cluster:
            prompt = [5] * (4 * BLOCK + 1)

            async def cached(**whose: Any) -> int:
                stream = cluster.submit(prompt, 3, **whose)
                assert await output_of(stream) == mock_output(prompt, 3)
                return stream.num_cached_tokens

            for whose in (
                {},
                {"cache_salt": "a"},
                {"tenant": "b"},
                {"tenant": "b", "cache_salt": "a"},
            ):
                assert await cached(**whose) == 0
                assert await cached(**whose) == 4 * BLOCK

    simulate(main())


def test_what_was_found_and_had_to_be_computed_again_was_not_cached() -> None:
    async def main() -> None:
        async with SimCluster(World(1), Shape(mover="zmq", num_prefill=2, num_decode=2)) as cluster:
            prompt = [5] * (20 * BLOCK + 1)
            await output_of(cluster.submit(prompt, 3))
            (store,) = cluster.stores
            for block in range(512):
                store._memory.arena[block * MOCK_LAYOUT.block_bytes] ^= 0xFF
            stream = cluster.submit(prompt, 3)
            assert await output_of(stream) == mock_output(prompt, 3)
            assert stream.timeline.num_attempts == 2
            assert store.num_corrupt == 20
            assert stream.num_cached_tokens == 0

    simulate(main())
