"""Damaged disks, by property: no wrong bytes, no exception, and the rest stays readable."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore.disk.format import SEGMENT_HEADER_BYTES, record_offset
from tests.sim.files import FAULTS
from tests.unit.disk_world import BLOCK_BYTES, RECORDS, DiskWorld, load, store

NUM_BLOCKS = 2 * RECORDS + 2
ALL = list(range(NUM_BLOCKS))


async def filled() -> DiskWorld:
    """Two full segments and one of two blocks."""
    world = DiskWorld(num_segments=8)
    await store(await world.start(), ALL)
    assert len(world.paths()) == 3
    return world


def hit(segment: int, offset: int) -> set[int]:
    """The blocks that a changed byte there concerns."""
    first = segment * RECORDS
    if offset < SEGMENT_HEADER_BYTES:
        return set(range(first, first + RECORDS))
    return {
        first
        + (offset - record_offset(0, 0)) // (record_offset(1, BLOCK_BYTES) - SEGMENT_HEADER_BYTES)
    }


@given(st.data())
def test_a_flipped_byte_costs_its_block_alone(data: st.DataObject) -> None:
    async def check() -> None:
        world = await filled()
        segment = data.draw(st.integers(0, 2))
        content = world.drive.contents[world.paths()[segment]]
        offset = data.draw(st.integers(0, len(content) - 1))
        content[offset] ^= data.draw(st.integers(1, 255))
        lost = hit(segment, offset)
        expected = [n for n in ALL if n not in lost]
        is_open = data.draw(st.booleans())
        assert await load(await world.start(), ALL) == expected
        tier = await world.start()
        assert await store(tier, ALL if is_open else [50])
        assert set(await load(tier, [*ALL, 50])) >= set(expected)

    asyncio.run(check())


@given(st.data())
def test_a_truncated_segment_keeps_what_is_whole(data: st.DataObject) -> None:
    async def check() -> None:
        world = await filled()
        segment = data.draw(st.integers(0, 2))
        content = world.drive.contents[world.paths()[segment]]
        end = data.draw(st.integers(0, len(content) - 1))
        del content[end:]
        whole = sum(record_offset(slot + 1, BLOCK_BYTES) <= end for slot in range(RECORDS))
        first = segment * RECORDS
        expected = [n for n in ALL if not first + whole <= n < first + RECORDS]
        assert await load(await world.start(), ALL) == expected

    asyncio.run(check())


@given(st.data())
def test_damage_behind_an_open_tiers_back_is_found_out(data: st.DataObject) -> None:
    async def check() -> None:
        world = await filled()
        tier = await world.start()
        segment = data.draw(st.integers(0, 2))
        content = world.drive.contents[world.paths()[segment]]
        offset = data.draw(st.integers(SEGMENT_HEADER_BYTES, len(content) - 1))
        if data.draw(st.booleans()):
            content[offset] ^= 1
            lost = hit(segment, offset)
        else:
            del content[offset:]
            lost = {
                n
                for n in range(segment * RECORDS, segment * RECORDS + RECORDS)
                if n >= min(hit(segment, offset))
            }
        assert await load(tier, ALL) == [n for n in ALL if n not in lost]
        assert tier.stats()["blocks_corrupt"] == len(lost & set(ALL))

    asyncio.run(check())


@given(st.integers(0, 2**32), st.integers(1, RECORDS))
def test_after_a_loss_of_power_only_the_last_write_is_missing(seed: int, count: int) -> None:
    async def check() -> None:
        world = await filled()
        world.drive.random.seed(seed)
        last = list(range(100, 100 + count))
        tier = await world.start()
        await store(tier, last)
        world.drive.lose_power()
        tier = await world.start()
        found = await load(tier, ALL + last)
        assert found[:NUM_BLOCKS] == ALL
        assert len(found) < NUM_BLOCKS + count
        assert await store(tier, last)
        assert await load(tier, ALL + last) == ALL + last

    asyncio.run(check())


def test_a_segment_of_random_bytes_is_skipped() -> None:
    async def check() -> None:
        world = await filled()
        for size in (0, 1, SEGMENT_HEADER_BYTES, 700):
            world.drive.contents[world.paths()[1]] = bytearray(world.drive.random.randbytes(size))
            tier = await world.start()
            assert await load(tier, ALL) == [n for n in ALL if not RECORDS <= n < 2 * RECORDS]

    asyncio.run(check())


def test_a_segment_put_in_the_place_of_another_is_read_for_what_it_is() -> None:
    async def check() -> None:
        world = await filled()
        tier = await world.start()
        contents, (first, second, _) = world.drive.contents, world.paths()
        contents[first], contents[second] = contents[second], contents[first]
        assert await load(tier, list(range(2 * RECORDS))) == []  # the stamps are others
        assert await load(await world.start(), ALL) == ALL

    asyncio.run(check())


steps: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    st.tuples(st.just("store"), st.lists(st.integers(0, 30), min_size=1, max_size=6)),
    st.tuples(st.just("load"), st.lists(st.integers(0, 30), min_size=1, max_size=6)),
    st.tuples(st.sampled_from(FAULTS), st.just([1])),
    st.tuples(st.sampled_from(["restart", "power", "wait", "other model"]), st.just([])),
)


@settings(max_examples=60)
@given(st.integers(2, 4), st.integers(0, 2**32), st.lists(steps, max_size=25))
def test_through_any_faults_what_is_loaded_is_right_and_the_budget_holds(
    num_segments: int, seed: int, history: list[tuple[str, list[int]]]
) -> None:
    async def check() -> None:
        world = DiskWorld(num_segments)
        world.drive.random.seed(seed)
        tier = await world.start()
        for step, numbers in history:
            if step == "store":
                await store(tier, numbers)
            elif step == "load":
                await load(tier, numbers)  # checks every byte
            elif step in FAULTS:
                world.drive.next[step] += 1
            elif step == "wait":
                world.clock.time += 10
            else:
                if step == "power":
                    world.drive.lose_power()
                tier = await world.start("other" if step == "other model" else "model")
            assert world.on_disk() <= world.budget_bytes
        world.drive.next.clear()
        world.clock.time += 10
        assert await store(tier, [7])
        assert await load(tier, [7]) in ([7], [])  # [] if a faulty write of it was believed
        assert await store(tier, [7])
        assert await load(tier, [7]) == [7]

    asyncio.run(check())
