"""The disk tier on a simulated disk: what is stored is found, and faults cost cache alone."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from common.config import StartError
from tests.sim.files import SimFiles
from tests.unit.disk_world import (
    BLOCK_BYTES,
    FOLDER,
    RECORDS,
    DiskWorld,
    bytes_of,
    key_of,
    load,
    name_of,
    store,
)


def entries_of(numbers: list[int]) -> list[tuple[bytes, memoryview]]:
    return [(key_of(n), memoryview(bytearray(BLOCK_BYTES))) for n in numbers]


# ---- storing and loading ------------------------------------------------------------------------


async def test_what_is_stored_is_loaded() -> None:
    tier = await DiskWorld().start()
    assert await store(tier, range(7))
    assert [n for n in range(9) if key_of(n) in tier] == list(range(7))
    assert await load(tier, [3, 8, 0, 6, 3]) == [3, 0, 6, 3]
    stats = tier.stats()
    assert (stats["blocks_written"], stats["blocks_loaded"], stats["num_blocks"]) == (7, 4, 7)


async def test_a_restart_keeps_what_was_stored() -> None:
    world = DiskWorld()
    await store(await world.start(), range(7))
    tier = await world.start()
    assert await load(tier, list(range(8))) == list(range(7))
    assert await store(tier, range(5, 12))
    assert await load(await world.start(), list(range(12))) == list(range(12))


async def test_what_is_there_is_not_written_again() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, [0, 1, 1, 0])
    before = world.on_disk()
    assert tier.is_safe(key_of(0))
    assert await store(tier, [1, 0])
    assert world.on_disk() == before
    assert tier.stats()["blocks_written"] == 2


async def test_a_block_that_would_go_soon_is_written_anew() -> None:
    tier = await DiskWorld(num_segments=4).start()
    await store(tier, range(4 * RECORDS))
    assert not tier.is_safe(key_of(0))
    await store(tier, [0])
    assert tier.is_safe(key_of(0))
    assert await load(tier, list(range(RECORDS))) == [0]


async def test_the_budget_holds_and_the_newest_blocks_stay() -> None:
    world = DiskWorld(num_segments=3)
    tier = await world.start()
    for first in range(0, 60, 3):
        assert await store(tier, range(first, first + 3))
        assert world.on_disk() <= world.budget_bytes
        assert tier.stats()["bytes"] == world.on_disk()
    found = await load(tier, list(range(60)))
    assert found == list(range(60 - len(found), 60))
    assert len(found) >= 2 * RECORDS
    assert tier.stats()["segments_removed"] == 60 // RECORDS - 3


async def test_a_smaller_budget_holds_from_the_start() -> None:
    world = DiskWorld(num_segments=6)
    await store(await world.start(), range(6 * RECORDS))
    world.budget_bytes = DiskWorld(num_segments=2).budget_bytes
    tier = await world.start()
    assert world.on_disk() <= world.budget_bytes
    assert await load(tier, list(range(6 * RECORDS))) == list(range(4 * RECORDS, 6 * RECORDS))


async def test_blocks_of_another_model_are_not_found_and_go_first() -> None:
    world = DiskWorld(num_segments=3)
    await store(await world.start("one"), range(RECORDS))
    tier = await world.start("other")
    assert key_of(0) not in tier
    await store(tier, range(100, 100 + 2 * RECORDS))
    assert await load(await world.start("one"), [0]) == [0]
    tier = await world.start("other")
    await store(tier, [200])
    assert world.on_disk() <= world.budget_bytes
    assert await load(tier, list(range(100, 100 + 2 * RECORDS))) == list(
        range(100, 100 + 2 * RECORDS)
    )
    assert key_of(0) not in await world.start("one")


async def test_two_stores_do_not_share_a_folder() -> None:
    world = DiskWorld()
    await world.start()
    world.files = SimFiles(world.drive)  # a second process, beside the first
    with pytest.raises(StartError, match=FOLDER):
        await world.start()


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full", "write_error", "torn"])
async def test_a_disk_that_takes_no_writes_is_tried_again_after_a_while(fault: str) -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, range(3))
    world.drive.on.add(fault)
    with structlog.testing.capture_logs() as logs:
        assert not await store(tier, range(3, 9))
        assert tier.is_paused
        assert not await store(tier, range(3, 9))  # not even tried
        assert world.drive.struck[fault] == 1
        world.clock.time += 10
        assert not await store(tier, range(3, 9))
        assert world.drive.struck[fault] == 2
        assert (tier.stats()["write_errors"], tier.stats()["is_failing"]) == (2, True)
        assert await load(tier, list(range(9))) == [0, 1, 2]
        world.drive.on.clear()
        world.clock.time += 10
        assert await store(tier, range(3, 9))
    warnings = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warnings == ["disk_tier_fails"]
    assert not tier.stats()["is_failing"]
    assert await load(tier, list(range(9))) == list(range(9))
    assert await load(await world.start(), list(range(9))) == list(range(9))


async def test_a_block_that_cannot_be_read_is_dropped() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, range(4))
    world.drive.next["read_error"] = 1
    assert await load(tier, [0, 1]) == [1]
    assert tier.stats()["blocks_unreadable"] == 1
    assert key_of(0) not in tier
    assert await store(tier, [0])
    assert await load(tier, [0]) == [0]


async def test_a_flipped_byte_is_found_out() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, range(4))
    world.drive.on.add("flipped")
    assert await load(tier, [0, 1, 2]) == []
    assert world.drive.struck["flipped"] == 3
    assert tier.stats()["blocks_corrupt"] == 3
    world.drive.on.clear()
    assert await load(tier, list(range(4))) == [3]


async def test_a_key_asked_for_twice_is_good_only_where_it_was_read_well() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, [0])
    world.drive.next["flipped"] = 1
    first, second = await tier.load(entries_of([0, 0]))
    assert first is None
    assert second == name_of(0)


async def test_a_write_that_was_lost_silently_is_found_out() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, range(3))
    world.drive.next["lost"] = 1
    assert await store(tier, range(10, 20))
    assert world.drive.struck["lost"] == 1
    assert set(await load(tier, [0, 1, 2, *range(10, 20)])) >= {0, 1, 2}


async def test_a_disk_that_fails_at_the_start_is_used_later() -> None:
    world = DiskWorld()
    await store(await world.start(), range(3))
    world.drive.on.add("read_error")
    tier = await world.start()
    assert key_of(0) not in tier
    assert not await store(tier, [5])
    world.drive.on.clear()
    world.clock.time += 10
    assert await store(tier, [5])
    assert await load(tier, [0, 1, 2, 5]) == [0, 1, 2, 5]


async def test_a_segment_that_cannot_be_removed_holds_up_writing() -> None:
    world = DiskWorld(num_segments=2)
    tier = await world.start()
    await store(tier, range(2 * RECORDS))
    world.drive.on.add("write_error")
    for _ in range(3):
        assert not await store(tier, [100])
        assert world.on_disk() <= world.budget_bytes
        world.clock.time += 10
    world.drive.on.clear()
    assert await store(tier, [100])
    assert world.on_disk() <= world.budget_bytes


# ---- at the same time ---------------------------------------------------------------------------


async def test_a_block_removed_while_its_load_waits_is_missing() -> None:
    world = DiskWorld(num_segments=2)
    tier = await world.start()
    await store(tier, range(2 * RECORDS))
    storing = asyncio.create_task(store(tier, range(100, 100 + RECORDS)))
    loading = asyncio.create_task(load(tier, list(range(2 * RECORDS))))
    loaded = await loading
    assert await storing
    assert loaded == list(range(RECORDS, 2 * RECORDS))


async def test_loads_and_stores_at_once_never_give_wrong_bytes() -> None:
    world = DiskWorld(num_segments=2)
    tier = await world.start()
    work = [store(tier, range(n, n + 5)) for n in range(0, 60, 5)]
    async with asyncio.TaskGroup() as group:
        for n, storing in zip(range(0, 60, 5), work, strict=True):
            group.create_task(storing)
            group.create_task(tier.load(entries_of(list(range(max(0, n - 9), n)))))
    assert world.on_disk() <= world.budget_bytes
    found = await load(tier, list(range(60)))
    assert found == list(range(60 - len(found), 60))


async def test_a_cancelled_load_ends_when_its_memory_is_used_no_more() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, [0])
    world.drive.latency_s = 0.001
    entries = entries_of([0])
    loading = asyncio.create_task(tier.load(entries))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert entries[0][1] == bytes_of(0)  # by then it had been read


async def test_a_cancelled_store_does_no_harm() -> None:
    world = DiskWorld()
    tier = await world.start()
    await store(tier, [0])
    storing = asyncio.create_task(store(tier, [1, 2]))
    await asyncio.sleep(0)
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert await store(tier, [3])
    assert await load(tier, list(range(4))) == [0, 3]
    assert set(await load(await world.start(), [0, 3])) == {0, 3}


# ---- whether to load ----------------------------------------------------------------------------


async def test_loading_is_worth_it_while_it_is_the_sooner() -> None:
    world = DiskWorld()
    tier = await world.start()
    assert tier.is_worth_loading(2, 16, 1e9)  # nothing is known
    await store(tier, [0])
    world.drive.latency_s = 0.001
    loading = asyncio.create_task(load(tier, [0]))
    await asyncio.sleep(0)
    world.clock.time += 1
    assert await loading == [0]
    assert tier.stats()["read_bytes_per_s"] == BLOCK_BYTES
    # Two blocks take 2 s to load; 32 tokens take as long at 16 tokens/s.
    assert tier.is_worth_loading(2, 16, 15)
    assert not tier.is_worth_loading(2, 16, 17)
    assert tier.is_worth_loading(2, 16, 0)  # the rate is not known
    world.clock.time += 100
    assert tier.is_worth_loading(2, 16, 17)  # what was measured is too old
