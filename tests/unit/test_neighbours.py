"""Pools of one device that copy from each other, with the CPU as the device: what a step reads is
what its positions hold, wherever that came from, and whoever changes it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.engine.cuda.ipc import SharingError
from common.engine.cuda.memory import ArenaFollower
from common.engine.cuda.notices import OwnNotice, is_locked
from common.engine.cuda.residency import IntArray
from common.engine.kv_cache import KvCache
from common.kv.hashing import KEY_BYTES
from common.kv.layout import KvLayout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=2, block_size=4, dtype="float32")
SIZE = LAYOUT.block_size
NUM_SLOTS = 8


class HostSharing:
    """Memory that any process of this host can map, by a descriptor of ours."""

    def __init__(self, device: str = "this") -> None:
        self.device = device
        self.num_open = 0
        self.closed = threading.Event()

    def export(self, memory: Tensor) -> bytes:
        descriptor, _ = memory.untyped_storage()._share_fd_cpu_()
        return f"/proc/{os.getpid()}/fd/{descriptor}".encode()

    def open(self, handle: bytes, num_bytes: int) -> Tensor:
        self.num_open += 1
        return torch.from_file(handle.decode(), shared=True, size=num_bytes, dtype=torch.uint8)

    def close(self, memory: Tensor) -> None:
        self.num_open -= 1
        self.closed.set()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pools = tmp_path / "pools"
    monkeypatch.setattr("common.engine.cuda.memory.default_folder", lambda: pools)
    return pools


@dataclass
class Worker:
    """One process's pool over the arena that all share."""

    follower: ArenaFollower
    sharing: HostSharing

    def write(self, slot: int, value: float) -> None:
        """A step that fills the block."""
        tables = np.array([[slot]], dtype=np.int32)
        step = self.follower.begin_step(tables, np.array([0]), np.array([SIZE]))
        self.follower.pool.blocks[step.tables[0, 0]] = value
        self.follower.end_step(step)

    def read(self, slot: int) -> float:
        """A step that reads it whole; NaN where it does not hold one value."""
        tables = np.array([[slot]], dtype=np.int32)
        step = self.follower.begin_step(tables, np.array([SIZE]), np.array([SIZE]))
        block = self.follower.pool.blocks[step.tables[0, 0]].clone()
        self.follower.end_step(step)
        value = block.flatten()[0]
        return float(value) if bool((block == value).all()) else float("nan")


@contextlib.contextmanager
def workers(count: int, num_blocks: int = 6, **sharings: HostSharing) -> Iterator[list[Worker]]:
    """`count` of them, and the arena is theirs[0].follower's."""
    arena = memoryview(bytearray(NUM_SLOTS * LAYOUT.block_bytes))
    made = []
    for index in range(count):
        sharing = sharings.get(f"worker_{index}", HostSharing())
        follower = ArenaFollower(LAYOUT, arena, num_blocks, CPU, sharing)
        made.append(Worker(follower, sharing))
    try:
        yield made
    finally:
        for worker in made:
            worker.follower.close()
        wait_until(lambda: not any(worker.sharing.num_open for worker in made))


def wait_until(is_so: Callable[[], bool]) -> None:
    """What a thread of its own will do at once."""
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.002)


def name_of(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def spoil(worker: Worker, slots: list[int]) -> None:
    """What the arena holds there must not be needed."""
    host = KvCache(LAYOUT, worker.follower._arena)
    for slot in slots:
        host.blocks[slot] = float("nan")


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


class World:
    """Two workers that fill slots and fetch them, and change them while the other one copies.

    The store may give a slot to another while somebody fetches it who has not heard of that: such a
    fetch is in vain. But no name may ever stand at a block that holds something else.
    """

    def __init__(self, both: list[Worker], rng: random.Random) -> None:
        self.both = both
        self.rng = rng
        self.final: dict[int, int] = {}  # which content each slot has, as the store knows it
        self.num_fills = dict.fromkeys(range(NUM_SLOTS), 0)
        self.counter = 0
        self.is_meddling = False
        for worker in both:
            self._disturb(worker)

    def _disturb(self, worker: Worker) -> None:
        copier = worker.follower._copier
        (other,) = (each for each in self.both if each is not worker)

        def disturbed(copy: Callable[..., None]) -> Callable[..., None]:
            def run(*copied: Any) -> None:
                self._meddle(other)
                copy(*copied)
                self._meddle(other)

            return run

        copier.copy_across = disturbed(copier.copy_across)  # type: ignore[method-assign]
        copier.copy_in = disturbed(copier.copy_in)  # type: ignore[method-assign]

    def _meddle(self, worker: Worker) -> None:
        """Not while one meddles already: this is one thread, and the other one has its lock."""
        if not self.is_meddling and self.rng.random() < 0.5:
            self.is_meddling = True
            self.fill(worker)
            self.is_meddling = False

    def run(self, length: int) -> None:
        for _ in range(length):
            worker = self.rng.choice(self.both)
            self.rng.choice([self.fill, self.fetch, self.fetch])(worker)
            self.check_names()

    def fill(self, worker: Worker) -> None:
        """A slot gets another content, which is as new, or was somewhere before."""
        slot = self.rng.randrange(NUM_SLOTS)
        content = self.rng.randrange(1, self.counter + 2)
        self.counter = max(self.counter, content)
        self.num_fills[slot] += 1
        worker.write(slot, float(content))
        worker.follower.save_sync({slot: name_of(content)})
        self.final[slot] = content

    def fetch(self, worker: Worker) -> None:
        count = self.rng.randint(0, min(2, len(self.final)))
        slots = self.rng.sample(sorted(self.final), count)
        wanted = {slot: self.final[slot] for slot in slots}
        before = dict(self.num_fills)
        worker.follower.fetch_sync({slot: name_of(wanted[slot]) for slot in slots})
        for slot in slots:
            if self.num_fills[slot] == before[slot]:
                seen = worker.read(slot)  # a load may be disturbed, too
                assert seen == wanted[slot] or self.num_fills[slot] != before[slot]

    def check_names(self) -> None:
        for worker in self.both:
            names = worker.follower._residency.names
            for block in np.flatnonzero(names[0]):
                content = worker.follower.pool.blocks[int(block)]
                assert bool((content == float(names[0, block])).all())
