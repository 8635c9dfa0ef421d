"""Blocks that the store fetches from workers' memory and brings there, in the simulated cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from common.config import StartError
from common.engine.mock import MOCK_LAYOUT, mock_output
from common.messages import Discard, GetBlocks, OfferMemory, PutBlocks, StaleError
from common.net.nixl import PIECE_BYTES, Pieces
from kvbaton.errors import OverloadedError, UnavailableError
from services.kvstore.handoff import Handoff
from tests.sim.cluster import DATA, STORES, Shape, SimCluster, listen, output_of, simulate
from tests.sim.nixl import SimNixl
from tests.sim.stranger import Stranger
from tests.sim.test_cluster_in_memory import serve_at_random
from tests.sim.test_hostile_members import while_serving
from tests.sim.world import World

BLOCK, BLOCK_BYTES = MOCK_LAYOUT.block_size, MOCK_LAYOUT.block_bytes
DEVICE = {"nixl_devices": "eth9"}
PROMPT = [5] * (300 * BLOCK)


def shape(**changes: Any) -> Shape:
    settings: dict[str, Any] = (
        {"mover": "nixl", "num_blocks": 1024, "worker": DEVICE} | DEVICE | changes
    )
    return Shape(**settings)


def in_frames(cluster: SimCluster) -> Counter[bool]:
    """Counts block messages, by whether their bytes came in frames."""
    counts: Counter[bool] = Counter()

    def heard(_pipe: object, message: PutBlocks | GetBlocks) -> None:
        counts[message.offset is None] += 1

    listen(cluster.world.network, PutBlocks, heard)
    listen(cluster.world.network, GetBlocks, heard)
    return counts


def test_bytes_go_through_memory_both_ways_and_none_in_frames() -> None:
    async def main() -> None:
        world = World(1)
        async with SimCluster(world, shape()) as cluster:
            counts = in_frames(cluster)
            verbs: Counter[str] = Counter()
            world.nixl.moved = lambda verb, data: verbs.update({verb: len(data)})
            assert await output_of(cluster.submit(PROMPT, 4)) == mock_output(PROMPT, 4)
            assert counts[True] == 0 < counts[False]
            assert verbs == {"read": 300 * BLOCK_BYTES, "write": 300 * BLOCK_BYTES}
            (store,) = cluster.stores
            counters = store.news.counters()
            assert counters["bytes_in_total"] == counters["bytes_out_total"] == verbs["read"]
            await cluster.settle()

    simulate(main())


def test_load_at_random_is_served_as_with_frames() -> None:
    async def main() -> None:
        async with SimCluster(World(2), shape(num_decode=2, num_prefill=2)) as cluster:
            counts = in_frames(cluster)
            await serve_at_random(cluster, 25)
            assert counts[True] == 0 < counts[False]

    simulate(main())


@pytest.mark.parametrize("verb", ["read", "write"])
def test_bytes_that_change_on_their_way_are_found_out_and_computed_again(verb: str) -> None:
    async def main() -> None:
        world = World(3)
        async with SimCluster(world, shape(num_prefill=2, num_decode=2)) as cluster:
            num_left = 1
            discarded: list[int] = []
            listen(world.network, Discard, lambda _pipe, it: discarded.extend(it.indexes))

            def flip(moved: str, data: memoryview) -> None:
                nonlocal num_left
                if moved == verb and num_left:
                    data[0] ^= 1
                    num_left -= 1

            world.nixl.moved = flip
            stream = cluster.submit(PROMPT, 4)
            assert await output_of(stream) == mock_output(PROMPT, 4)
            assert num_left == 0
            # What came wrong before decode claims comes again with the claim.
            assert stream.timeline.num_attempts == (2 if verb == "read" else 1)
            assert cluster.stores[0].num_corrupt == 1
            assert len(discarded) == (verb == "write")
            await cluster.settle()

    simulate(main())


def test_what_nixl_fails_to_do_goes_in_frames_from_then_on() -> None:
    async def main() -> None:
        world = World(4)
        async with SimCluster(world, shape()) as cluster:
            counts = in_frames(cluster)
            world.nixl.is_broken = True
            stream = cluster.submit(PROMPT, 4)
            assert await output_of(stream) == mock_output(PROMPT, 4)
            assert stream.timeline.num_attempts == 1
            num_tried = counts[False]
            assert counts[True] >= num_tried > 0
            await output_of(cluster.submit([6] * 100, 4))
            assert counts[False] == num_tried
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize(
    "changes", [{"nixl_devices": ""}, {"movers": ("zmq",)}], ids=["store", "worker"]
)
def test_where_one_side_has_none_of_it_all_goes_in_frames(changes: dict[str, Any]) -> None:
    async def main() -> None:
        async with SimCluster(World(5), shape(**changes)) as cluster:
            counts = in_frames(cluster)
            assert await output_of(cluster.submit(PROMPT, 4)) == mock_output(PROMPT, 4)
            assert counts[False] == 0 < counts[True]

    simulate(main())


@pytest.mark.parametrize(
    ("worker", "words"),
    [({}, "trusted with --nixl-devices"), ({"kv_compression": "lossless"} | DEVICE, "whole")],
)
def test_a_worker_does_not_start_without_trust_or_with_compression(
    worker: dict[str, Any], words: str
) -> None:
    async def main() -> None:
        with pytest.raises(StartError, match=words):
            async with SimCluster(World(6), shape(worker=worker)):
                pass

    simulate(main())


def test_a_restarted_store_and_a_restarted_worker_meet_again() -> None:
    async def main() -> None:
        world = World(7)
        async with SimCluster(world, shape()) as cluster:
            await cluster.restart_store()
            await asyncio.sleep(5)
            await cluster.kill(cluster.workers[0])
            await cluster.add_worker("prefill")
            await asyncio.sleep(5)
            counts = in_frames(cluster)
            assert await output_of(cluster.submit(PROMPT, 4)) == mock_output(PROMPT, 4)
            assert counts[True] == 0 < counts[False]
            known = world.nixl.agents[cluster.stores[0]._instance_id].known
            offered = {worker._moving.memory.agent.name for worker in cluster.workers}  # type: ignore[union-attr]
            assert known == offered  # and not of the one that is dead
            await cluster.settle()

    simulate(main())


def test_memory_is_named_only_with_the_right_to_it() -> None:
    """And a put of another epoch, or of blocks of others, changes nothing."""

    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        agent = cluster.world.nixl.agent("stranger", "")
        pieces = Pieces(agent, 1 << 20, BLOCK_BYTES)
        control, data = Stranger(cluster, STORES[0]), Stranger(cluster, DATA[0])
        assert await control.hello("prefill") == "Welcome"
        assert await data.hello("prefill") == "Welcome"
        step: dict[str, Any] = {"handoff_id": handoff.handoff_id, "epoch": handoff.epoch}
        offer = {"address": pieces.address, "num_bytes": pieces.num_bytes}
        get = GetBlocks(**step, indexes=[0], offset=0)
        put = {**step, "first_index": 0, "digests": [b"d" * 16], "blocks": [handoff.blocks[0]]}
        before = bytes(cluster.stores[0]._memory.arena)
        with agent.busy():
            assert await data.ask(PutBlocks(**put, offset=0)) == "protocol_error"  # no offer yet
            garbage = OfferMemory(metadata=b"garbage", **offer)
            assert await data.ask(garbage) == "unavailable"
            assert await control.ask(OfferMemory(metadata=b"stranger", **offer)) == "forbidden"
            assert await data.ask(OfferMemory(metadata=b"stranger", **offer)) == "Ok"
            for asked, code in (
                (get, "stale"),
                (PutBlocks(**put, offset=0), "stale"),  # fetched, and then refused
                (PutBlocks(**{**put, "epoch": handoff.epoch + 1}, offset=0), "stale"),
                (PutBlocks(**put, offset=pieces.num_bytes), "protocol_error"),
                (PutBlocks(**put, offset=-1), "protocol_error"),
                (PutBlocks(**{**put, "blocks": [0] * 2000}, offset=0), "protocol_error"),
                (PutBlocks(**{**put, "digests": []}, offset=0), "protocol_error"),
            ):
                assert await data.ask(asked) == code, asked
        assert bytes(cluster.stores[0]._memory.arena)[:BLOCK_BYTES] == before[:BLOCK_BYTES]

    while_serving(check, Shape(nixl_devices="eth9"))


def test_a_store_without_nixl_refuses_memory_in_words() -> None:
    async def check(cluster: SimCluster, handoff: Handoff) -> None:
        control, data = Stranger(cluster, STORES[0]), Stranger(cluster, DATA[0])
        assert await control.hello("decode") == "Welcome"
        assert await data.hello("decode") == "Welcome"
        offer = OfferMemory(metadata=b"m", address=1, num_bytes=1)
        for asked in (offer, GetBlocks(handoff_id="h", epoch=1, indexes=[0], offset=0)):
            assert await data.ask(asked) == "protocol_error"
            assert "does not use NIXL" in data.refusal

    while_serving(check)


@pytest.mark.parametrize(
    ("error", "again_after_s"),
    [(None, 0), (StaleError("over"), 0), (UnavailableError("stuck"), 60)],
)
def test_memory_is_lent_once_and_after_a_doubt_later(
    error: Exception | None, again_after_s: float
) -> None:
    async def main() -> None:
        pieces = Pieces(SimNixl().agent("a", ""), PIECE_BYTES, BLOCK_BYTES)
        try:
            with pieces.lent() as piece:
                assert len(piece.memory) == PIECE_BYTES
                with pytest.raises(OverloadedError), pieces.lent():
                    pass
                if error is not None:
                    raise error
        except (StaleError, UnavailableError):
            pass
        if again_after_s:
            with pytest.raises(OverloadedError), pieces.lent():
                pass
            await asyncio.sleep(again_after_s + 1)
        with pieces.lent() as again:
            assert again == piece

    simulate(main())


def test_a_large_block_has_a_piece_for_itself_if_there_is_room() -> None:
    agent = SimNixl().agent("a", "")
    large = Pieces(agent, 4 * PIECE_BYTES, 2 * PIECE_BYTES)
    with large.lent() as one, large.lent() as other:
        assert {one.offset, other.offset} == {0, 2 * PIECE_BYTES}
    with pytest.raises(OverloadedError), Pieces(agent, PIECE_BYTES, 2 * PIECE_BYTES).lent():
        pass
