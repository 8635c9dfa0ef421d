"""The arena with real files and real processes: what one maps and writes, the other reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.kv.arena import ARENA_PREFIX, JOURNAL_SUFFIX, ArenaError, LiveDisk
from common.worker.memory import WorkerMemory

ROOT = Path(__file__).parents[2]
PAGE = 4096

WORKER = """
import sys
from common.kv.arena import LiveDisk
from common.worker.memory import WorkerMemory
path, block_bytes, num_blocks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = WorkerMemory(LiveDisk(), block_bytes, num_blocks, 1)
memory.map(0, path)
place = memory.place(0)
for line in sys.stdin:
    step, block, marker = line.split()
    start = int(block) * block_bytes
    if step == "write":
        place[start : start + len(marker)] = marker.encode()
    print(bytes(place[start : start + len(marker)]).decode("latin1"), flush=True)
"""
OWNER = """
import sys
from common.kv.arena import LiveDisk
arena = LiveDisk().create_arena(sys.argv[1], 8192)
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of shared memory."""
    path = Path(tempfile.mkdtemp(prefix="kvbaton-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


class Process:
    """Python running a few lines, spoken to line by line."""

    def __init__(self, code: str, *arguments: object) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> str:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


def test_what_one_process_writes_into_a_block_another_reads_in_place(folder: Path) -> None:
    """The handoff on one host: prefill and decode map the store's file, and no byte moves."""
    path = folder / f"{ARENA_PREFIX}test"
    arena = LiveDisk().create_arena(str(path), 8 * PAGE)
    prefill, decode = (Process(WORKER, path, PAGE, 8) for _ in range(2))
    try:
        assert decode.say("read 5 marker") == "\0" * 6
        assert prefill.say("write 5 marker") == "marker"
        assert decode.say("read 5 marker") == "marker"
        assert bytes(arena[5 * PAGE : 5 * PAGE + 6]) == b"marker"
        arena[7 * PAGE : 7 * PAGE + 5] = b"store"
        assert prefill.say("read 7 store") == "store"
        assert decode.say("write 5 DECODE") == "DECODE"
        assert prefill.say("read 5 DECODE") == "DECODE"
    finally:
        for process in (prefill, decode):
            process.kill()


def test_a_new_arena_is_empty_reserved_and_its_owners_alone(folder: Path) -> None:
    path = folder / f"{ARENA_PREFIX}test"
    arena = LiveDisk().create_arena(str(path), 3 * PAGE + 10)
    stats = path.stat()
    assert stats.st_mode & 0o7777 == 0o600
    assert stats.st_size == len(arena) == 3 * PAGE + 10
    assert stats.st_blocks * 512 == 4 * PAGE
    assert bytes(arena) == bytes(len(arena))


def test_a_file_of_the_same_name_is_replaced_and_not_written_through(folder: Path) -> None:
    victim = folder / "victim"
    victim.write_bytes(b"precious")
    path = folder / f"{ARENA_PREFIX}test"
    path.symlink_to(victim)
    arena = LiveDisk().create_arena(str(path), PAGE)
    arena[:4] = b"mine"
    assert victim.read_bytes() == b"precious"
    assert not path.is_symlink()


def test_more_than_the_folder_holds_is_refused_with_what_to_do(folder: Path) -> None:
    stats = os.statvfs(folder)
    num_bytes = stats.f_blocks * stats.f_frsize + (1 << 30)
    path = folder / f"{ARENA_PREFIX}test"
    with pytest.raises(ArenaError) as refused:
        LiveDisk().create_arena(str(path), num_bytes)
    words = str(refused.value)
    assert f"the KV arena needs {num_bytes}" in words
    assert f"{folder} has " in words
    for way_out in ("mount -o remount,size=", "--kv-bytes", "--arena-dir"):
        assert way_out in words
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("num_bytes", [0, 1 << 64])
def test_a_size_that_cannot_be_is_refused_and_leaves_no_file(folder: Path, num_bytes: int) -> None:
    with pytest.raises(ArenaError, match=f"cannot reserve {num_bytes} bytes"):
        LiveDisk().create_arena(str(folder / f"{ARENA_PREFIX}test"), num_bytes)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    path = str(folder / "nowhere" / "arena")
    with pytest.raises(ArenaError, match=f"cannot create the KV arena {path}: No such file"):
        LiveDisk().create_arena(path, PAGE)
    with pytest.raises(ArenaError, match=f"cannot open the KV arena {path}: No such file"):
        LiveDisk().map_into(LiveDisk().reserve(PAGE), 0, path, PAGE)


def test_only_arenas_of_dead_owners_are_swept(folder: Path) -> None:
    paths = [folder / f"{ARENA_PREFIX}{name}" for name in ("dead", "alive")]
    dead, alive = owners = [Process(OWNER, path) for path in paths]
    mine = LiveDisk().create_arena(str(folder / f"{ARENA_PREFIX}mine"), PAGE)
    try:
        assert [owner.hear() for owner in owners] == ["made", "made"]
        assert LiveDisk().sweep_arenas(str(folder)) == []
        dead.kill()
        assert LiveDisk().sweep_arenas(str(folder)) == [str(paths[0])]
        assert not paths[0].exists()
        assert paths[1].exists()
    finally:
        alive.kill()
    mine.release()
    assert len(LiveDisk().sweep_arenas(str(folder))) == 2


def test_what_a_dead_owner_left_is_taken_over_with_its_bytes(folder: Path) -> None:
    path = str(folder / f"{ARENA_PREFIX}test")
    assert LiveDisk().open_arena(path) is None
    owner = Process(OWNER, path)
    try:
        assert owner.hear() == "made"
        for attempt in (LiveDisk().open_arena, LiveDisk().create_arena):
            with pytest.raises(ArenaError, match="another process uses the KV arena"):
                attempt(path, 8192)
        Path(path).write_bytes(b"left".ljust(8192))
    finally:
        owner.kill()
    assert LiveDisk().open_arena(path, 4096) is None
    arena = LiveDisk().open_arena(path, 8192)
    assert arena is not None
    assert bytes(arena[:4]) == b"left"
    with pytest.raises(ArenaError, match="another process uses the KV arena"):
        LiveDisk().open_arena(path)


def test_what_others_could_have_written_is_not_taken_over(folder: Path) -> None:
    path = folder / f"{ARENA_PREFIX}test"
    path.write_bytes(bytes(PAGE))
    path.chmod(0o666)
    assert LiveDisk().open_arena(str(path)) is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert LiveDisk().open_arena(str(path)) is None


def test_an_arena_that_can_be_taken_over_is_kept_until_its_room_is_needed(folder: Path) -> None:
    names = ["one", f"one{JOURNAL_SUFFIX}", "two", f"three{JOURNAL_SUFFIX}"]
    paths = [folder / f"{ARENA_PREFIX}{name}" for name in names]
    for path in paths:
        path.write_bytes(b"left")
    assert LiveDisk().sweep_arenas(str(folder), keep_journaled=True) == sorted(
        str(path) for path in paths[2:]
    )
    assert LiveDisk().sweep_arenas(str(folder)) == [str(path) for path in paths[:2]]
    assert list(folder.iterdir()) == []


def test_an_arena_that_is_just_being_made_is_not_swept(folder: Path) -> None:
    (folder / f"{ARENA_PREFIX}new").touch()
    assert LiveDisk().sweep_arenas(str(folder)) == []
    assert (folder / f"{ARENA_PREFIX}new").exists()


def test_other_files_are_not_swept(folder: Path) -> None:
    (folder / "notes").write_text("kept")
    assert LiveDisk().sweep_arenas(str(folder)) == []
    assert (folder / "notes").read_text() == "kept"


def test_a_removed_arena_stays_mapped(folder: Path) -> None:
    path = str(folder / f"{ARENA_PREFIX}test")
    arena = LiveDisk().create_arena(path, PAGE)
    memory = LiveDisk().reserve(PAGE)
    LiveDisk().map_into(memory, 0, path, PAGE)
    LiveDisk().remove_arena(path)
    LiveDisk().remove_arena(path)
    arena[0] = 7
    assert memory[0] == 7


def test_a_smaller_file_leaves_the_rest_of_its_place_private(folder: Path) -> None:
    path = str(folder / f"{ARENA_PREFIX}test")
    arena = LiveDisk().create_arena(path, PAGE)
    memory = LiveDisk().reserve(4 * PAGE)
    LiveDisk().map_into(memory, PAGE, path, 3 * PAGE)
    memory[:] = b"x" * len(memory)
    assert bytes(arena) == b"x" * PAGE
    assert bytes(memory[2 * PAGE :]) == b"x" * 2 * PAGE


def test_of_a_larger_file_no_more_is_mapped_than_the_place_holds(folder: Path) -> None:
    path = str(folder / f"{ARENA_PREFIX}test")
    arena = LiveDisk().create_arena(path, 3 * PAGE)
    memory = LiveDisk().reserve(4 * PAGE)
    LiveDisk().map_into(memory, PAGE, path, 2 * PAGE)
    memory[:] = b"x" * len(memory)
    assert bytes(arena) == b"x" * 2 * PAGE + bytes(PAGE)


def test_a_file_that_cannot_be_mapped_is_refused(folder: Path) -> None:
    path = folder / f"{ARENA_PREFIX}empty"
    path.touch()
    with pytest.raises(ArenaError, match=f"cannot map the KV arena {path}: Invalid argument"):
        LiveDisk().map_into(LiveDisk().reserve(PAGE), 0, str(path), PAGE)


def test_each_store_has_a_place_where_its_blocks_keep_their_numbers(folder: Path) -> None:
    """Blocks of 6000 bytes, which pages do not divide; the second store cannot be mapped."""
    path = str(folder / f"{ARENA_PREFIX}test")
    arena = LiveDisk().create_arena(path, 5 * 6000)
    memory = WorkerMemory(LiveDisk(), 6000, 5, 2)
    memory.map(0, path)
    for store in (0, 1):
        assert memory.place(store).nbytes % 6000 == 0
        start = memory.first_slot(store) * 6000
        memory.all[start : start + 4] = b"here"
        assert bytes(memory.place(store)[:4]) == b"here"
    assert bytes(arena[:4]) == b"here"
    assert bytes(arena[4:]) == bytes(5 * 6000 - 4)
