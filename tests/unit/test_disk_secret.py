"""The secret of a folder: made once, kept, and replaced together with the blocks it was for."""

from __future__ import annotations

import pytest

from common.config import StartError
from services.kvstore.disk.secret import load_or_make_secret
from tests.sim.files import SimFiles
from tests.unit.disk_world import FOLDER, DiskWorld, key_of, store

ONE, OTHER = bytes(range(32)), bytes(64)
PATH = f"{FOLDER}/secret"


async def secret_of(world: DiskWorld, new: bytes) -> bytes:
    """What the next process has for a secret."""
    world.files.close()
    world.files = SimFiles(world.drive)
    return await load_or_make_secret(world.files, FOLDER, lambda: new)


async def test_a_secret_is_made_once() -> None:
    world = DiskWorld()
    assert await secret_of(world, ONE) == ONE
    assert await secret_of(world, OTHER) == ONE


async def test_with_its_secret_a_folder_keeps_its_blocks() -> None:
    world = DiskWorld()
    await secret_of(world, ONE)
    await store(await world.start(), [0])
    await secret_of(world, OTHER)
    assert key_of(0) in await world.start()


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped"])
async def test_a_damaged_secret_is_replaced_and_the_blocks_are_removed(damage: str) -> None:
    world = DiskWorld()
    await secret_of(world, ONE)
    await store(await world.start(), [0])
    content = world.drive.contents[PATH]
    if damage == "missing":
        del world.drive.contents[PATH]
    elif damage == "empty":
        content.clear()
    elif damage == "short":
        del content[-1:]
    else:
        content[5] ^= 1
    assert await secret_of(world, OTHER) == OTHER
    assert world.paths() == [PATH]
    assert await secret_of(world, ONE) == OTHER


async def test_a_secret_that_cannot_be_read_just_now_takes_no_blocks_with_it() -> None:
    world = DiskWorld()
    await secret_of(world, ONE)
    await store(await world.start(), [0])
    world.drive.next["read_error"] = 1
    assert await secret_of(world, OTHER) == OTHER
    assert world.drive.struck["read_error"] == 1
    assert await secret_of(world, OTHER) == ONE
    assert key_of(0) in await world.start()


async def test_a_byte_flipped_anywhere_never_gives_another_secret() -> None:
    world = DiskWorld()
    await secret_of(world, ONE)
    good = bytes(world.drive.contents[PATH])
    for place in range(len(good)):
        for change in (1, 0x20, 0x80):
            bad = bytearray(good)
            bad[place] ^= change
            world.drive.contents[PATH] = bad
            assert await secret_of(world, OTHER) == OTHER


@pytest.mark.parametrize("fault", ["full", "write_error", "torn"])
async def test_a_disk_that_fails_gives_a_secret_for_this_run(fault: str) -> None:
    world = DiskWorld()
    world.drive.on.add(fault)
    assert await secret_of(world, ONE) == ONE
    assert world.drive.struck[fault] == 1
    world.drive.on.clear()
    assert await secret_of(world, OTHER) == OTHER


async def test_a_folder_of_another_process_is_refused() -> None:
    world = DiskWorld()
    await secret_of(world, ONE)
    with pytest.raises(StartError, match=FOLDER):
        await load_or_make_secret(SimFiles(world.drive), FOLDER, lambda: OTHER)
