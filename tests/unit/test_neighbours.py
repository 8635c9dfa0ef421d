"""Pools of one device that copy from each other, with the CPU as the device: what a step reads is
what its positions hold, wherever that came from, and whoever changes it meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.engine.cuda.ipc import SharingError
from common.engine.cuda.notices import OwnNotice
from common.engine.cuda.residency import IntArray
from common.engine.kv_cache import KvCache
from common.locks import is_locked
from tests.unit.neighbours_world import (
    LAYOUT,
    HostSharing,
    World,
    name_of,
    spoil,
    wait_until,
    workers,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pools = tmp_path / "pools"
    monkeypatch.setattr("common.engine.cuda.memory.default_folder", lambda: pools)
    return pools


def test_a_final_block_comes_from_the_pool_that_has_it() -> None:
    with workers(2) as (prefill, decode):
        for slot in (1, 2, 3):
            prefill.write(slot, slot * 10.0)
        prefill.follower.save_sync({1: name_of(1), 2: name_of(2), 3: b""})
        spoil(prefill, [1, 2])
        assert (
            decode.follower.fetch_sync({1: name_of(1), 2: name_of(2), 3: b""}).num_from_neighbours
            == 2
        )
        assert [decode.read(slot) for slot in (1, 2, 3)] == [10.0, 20.0, 30.0]


def test_what_was_fetched_can_be_copied_on() -> None:
    with workers(3) as (first, second, third):
        first.write(1, 10.0)
        first.follower.save_sync({1: name_of(1)})
        assert second.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 1
        first.write(1, 11.0)  # its slot is another sequence's now
        spoil(first, [1])
        assert third.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 1
        assert third.read(1) == 10.0


def test_what_came_from_the_arena_is_not_vouched_for() -> None:
    """Who fetches may not have heard yet that the slot is another's."""
    with workers(3) as (first, second, third):
        first.write(1, 99.0)
        first.follower.save_sync({1: b""})
        assert second.follower.fetch_sync({1: name_of(1)}) == (1, 0)
        assert third.follower.fetch_sync({1: name_of(1)}) == (1, 0)


async def test_a_save_that_had_to_wait_names_nothing_that_has_changed_meanwhile() -> None:
    with workers(2) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.write(2, 20.0)
        with prefill.follower._copying:
            saving = asyncio.ensure_future(prefill.follower.save({1: name_of(1), 2: name_of(2)}))
            await asyncio.sleep(0)
            prefill.write(1, 11.0)
        await saving
        assert decode.follower.fetch_sync({1: name_of(1), 2: name_of(2)}) == (2, 1)
        assert [decode.read(slot) for slot in (1, 2)] == [11.0, 20.0]


def test_blocks_lose_their_names_when_they_are_written_evicted_or_forgotten() -> None:
    with workers(2, num_blocks=2) as (owner, other):
        host = KvCache(LAYOUT, owner.follower._arena)
        owner.write(1, 10.0)
        owner.follower.save_sync({1: name_of(1)})
        owner.write(1, 11.0)
        assert other.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0
        owner.follower.save_sync({1: name_of(2)})
        owner.follower.fetch_sync({2: name_of(3), 3: b""})  # 1 leaves
        assert other.follower.fetch_sync({1: name_of(2)}).num_from_neighbours == 0
        assert float(host.blocks[1].flatten()[0]) == other.read(1) == 11.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_that_changes_while_it_is_copied_comes_from_the_arena(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers(2) as (prefill, decode):
        for slot in (1, 2):
            prefill.write(slot, slot * 10.0)
        prefill.follower.save_sync({1: name_of(1), 2: name_of(2)})
        copy = decode.follower._copier.copy_across

        def copy_across(other: Tensor, theirs: IntArray, ours: IntArray) -> None:
            if when == "before":
                prefill.write(2, 99.0)
            copy(other, theirs, ours)
            if when == "after":
                prefill.write(2, 99.0)

        monkeypatch.setattr(decode.follower._copier, "copy_across", copy_across)
        assert decode.follower.fetch_sync({1: name_of(1), 2: name_of(2)}).num_from_neighbours == 1
        assert [decode.read(slot) for slot in (1, 2)] == [10.0, 20.0]


def test_content_that_went_and_came_back_while_it_was_copied_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with workers(2) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        copy = decode.follower._copier.copy_across

        def copy_across(other: Tensor, theirs: IntArray, ours: IntArray) -> None:
            prefill.write(1, 99.0)
            copy(other, theirs, ours)
            prefill.write(1, 10.0)
            prefill.follower.save_sync({1: name_of(1)})

        monkeypatch.setattr(decode.follower._copier, "copy_across", copy_across)
        assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0
        assert decode.read(1) == 10.0


def test_pools_elsewhere_and_of_another_layout_are_left_alone() -> None:
    with workers(2, worker_1=HostSharing("another GPU")) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0
        assert decode.sharing.num_open == 0


def test_a_pool_that_cannot_be_shared_or_mapped_is_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise SharingError("not here")

    sharing = HostSharing()
    monkeypatch.setattr(sharing, "open", refuse)
    with workers(2, worker_1=sharing) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0
        assert decode.read(1) == 10.0
    folder.chmod(0o755)
    with workers(1) as (alone,):
        assert alone.follower._neighbours is None
        alone.write(1, 10.0)
        alone.follower.save_sync({1: name_of(1)})
        assert alone.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0


def test_without_the_folder_all_comes_from_the_arena(folder: Path) -> None:
    with workers(2) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        shutil.rmtree(folder)
        assert decode.follower.fetch_sync({1: name_of(1)}) == (1, 0)
        assert decode.read(1) == 10.0


@pytest.mark.parametrize("is_mapped", [False, True])
def test_what_fails_on_the_way_leaves_nothing_taken(
    is_mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("no such view")

    with workers(2, num_blocks=2) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        decode.follower.fetch_sync({1: b""})
        prefill.write(1, 11.0)
        prefill.follower.save_sync({1: name_of(2)})
        with monkeypatch.context() as broken:
            if is_mapped:  # the copy fails: so does the fetch
                broken.setattr(decode.follower._copier, "copy_across", fail)
                with pytest.raises(RuntimeError):
                    decode.follower.fetch_sync({1: name_of(2), 2: b""})
            else:
                broken.setattr("common.engine.cuda.neighbours._Neighbour", fail)
                assert decode.follower.fetch_sync({1: name_of(2)}) == (1, 0)
                assert decode.sharing.num_open == 0
        assert decode.read(1) == 11.0  # and not what was there before
        assert decode.follower._residency.num_free == 1


def test_a_pool_that_is_closed_has_nothing_mapped_and_a_new_one_is_seen_alone(
    folder: Path,
) -> None:
    with workers(2) as both:
        prefill, decode = both
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        assert decode.follower.fetch_sync({1: name_of(1)}) == (1, 1)
        decode.follower.close()
        assert decode.sharing.num_open == 0
        assert len(list(folder.iterdir())) == 1
        with workers(1):
            assert len(list(folder.iterdir())) == 2
        assert len(list(folder.iterdir())) == 1
        both.remove(decode)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 4096, b"\0" * 8192])
def test_a_file_that_is_none_is_passed_over(folder: Path, content: bytes) -> None:
    with workers(2) as (prefill, decode):
        prefill.write(1, 10.0)
        prefill.follower.save_sync({1: name_of(1)})
        (folder / "0-strange").write_bytes(content)
        with OwnedFile(folder / "1-strange", content):
            assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 1
        assert not (folder / "0-strange").exists()  # nobody has it locked


class OwnedFile:
    """A file whose owner lives."""

    def __init__(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LOCK, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"locked\n"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


_LOCK = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_is_missed_at_once(folder: Path) -> None:
    sharing = HostSharing()
    with workers(1, worker_0=sharing) as (decode,):
        command = [sys.executable, "-m", "tests.unit.neighbour_process", str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"saved\n"
            spoil(decode, [1])
            assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 1
            assert decode.read(1) == 10.0
            assert sharing.num_open == 1
            process.kill()
            assert sharing.closed.wait(20)  # without being asked for anything
        wait_until(lambda: len(list(folder.iterdir())) == 1)
        assert decode.follower.fetch_sync({1: name_of(1)}).num_from_neighbours == 0


def test_a_notice_is_whole_when_it_can_be_seen_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert [path.name[0] for path in folder.iterdir()] == ["."]
        raise OSError("no room")

    monkeypatch.setattr(OwnNotice, "_write", fail)
    with workers(1) as (alone,):
        assert alone.follower._neighbours is None
    assert list(folder.iterdir()) == []


def test_an_unfinished_notice_of_a_dead_process_is_removed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / ".left").write_bytes(b"half")
    (folder / ".new").touch()  # perhaps of one that is about to lock it
    with OwnedFile(folder / ".under-way", b"half"), workers(1):
        assert {path.name for path in folder.glob(".*")} == {".new", ".under-way"}


def test_a_lock_tells_that_the_owner_lives(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with OwnedFile(path, b""):
        file = os.open(path, os.O_RDWR)
        assert is_locked(file)
    assert not is_locked(file)
    os.close(file)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_meanwhile_a_step_reads_what_the_name_says(seed: int) -> None:
    rng = random.Random(seed)
    with workers(2, num_blocks=3) as both:
        World(both, rng).run(30)
