"""Files on a real disk and in the simulation: both keep the contract; and the tier on real ones."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import StartError
from common.files import LiveFiles
from common.seams import Files, LiveClock, LiveRng
from services.kvstore.disk.secret import load_or_make_secret
from services.kvstore.disk.tier import DiskTier
from tests.sim.files import SimDrive, SimFiles
from tests.unit.disk_world import BLOCK_BYTES, DiskWorld, load, store

LOCKER = """
import sys
from common.files import LiveFiles
LiveFiles().lock_folder(sys.argv[1])
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def live() -> Iterator[LiveFiles]:
    files = LiveFiles()
    yield files
    files.close()


@pytest.fixture(params=["live", "simulated"])
def files(request: pytest.FixtureRequest, live: LiveFiles) -> Files:
    return live if request.param == "live" else SimFiles(SimDrive(1, latency_s=0))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "some" / "disk")


def parts_of(*pieces: bytes) -> list[memoryview]:
    return [memoryview(bytearray(piece)) for piece in pieces]


async def tier_on(files: Files, folder: str) -> DiskTier:
    tier = DiskTier(
        files,
        folder,
        budget_bytes=DiskWorld(num_segments=3).budget_bytes,
        block_bytes=BLOCK_BYTES,
        fingerprint="model",
        clock=LiveClock(),
        rng=LiveRng(),
    )
    await tier.open()
    return tier


# ---- the contract -------------------------------------------------------------------------------


def test_what_is_written_in_parts_is_read_in_parts(files: Files, folder: str) -> None:
    files.lock_folder(folder)
    files.write(f"{folder}/a", 0, parts_of(b"abc", b"", b"defg"))
    files.write(f"{folder}/a", 5, parts_of(b"XYZ"))
    parts = parts_of(bytes(2), bytes(3), bytes(9))
    assert files.read(f"{folder}/a", 1, parts) == 7
    assert [bytes(part) for part in parts] == [b"bc", b"deX", b"YZ" + bytes(7)]
    assert files.read(f"{folder}/a", 8, parts) == 0
    assert files.list_folder(folder) == {"a": 8}


def test_more_parts_than_the_system_takes_at_once_are_moved(files: Files, folder: str) -> None:
    files.lock_folder(folder)
    pieces = [bytes([number % 256]) * 3 for number in range(2500)]
    files.write(f"{folder}/a", 0, parts_of(*pieces))
    parts = parts_of(*[bytes(3)] * 2500)
    assert files.read(f"{folder}/a", 0, parts) == 7500
    assert [bytes(part) for part in parts] == pieces


def test_a_gap_reads_as_zeros(files: Files, folder: str) -> None:
    files.lock_folder(folder)
    files.write(f"{folder}/a", 3, parts_of(b"x"))
    parts = parts_of(b"....")
    files.read(f"{folder}/a", 0, parts)
    assert bytes(parts[0]) == b"\0\0\0x"


def test_what_is_not_there_cannot_be_read_but_removed(files: Files, folder: str) -> None:
    files.lock_folder(folder)
    with pytest.raises(FileNotFoundError):
        files.read(f"{folder}/a", 0, parts_of(b"x"))
    files.remove(f"{folder}/a")
    files.write(f"{folder}/a", 0, parts_of(b"x"))
    files.remove(f"{folder}/a")
    assert files.list_folder(folder) == {}


def test_a_saved_file_replaces_the_former(files: Files, folder: str) -> None:
    files.lock_folder(folder)
    for content in (b"longer", b"new"):
        files.save(f"{folder}/a", content)
    parts = parts_of(bytes(9))
    assert files.read(f"{folder}/a", 0, parts) == 3
    assert files.list_folder(folder) == {"a": 3}


async def test_work_is_done_in_order_and_its_errors_are_the_callers(files: Files) -> None:
    done: list[int] = []
    await asyncio.gather(*[files.run(lambda n=n: done.append(n)) for n in range(9)])  # type: ignore[misc]
    assert done == list(range(9))

    def fail() -> None:
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        await files.run(fail)
    assert await files.run(lambda: 5) == 5


async def test_the_tier_keeps_blocks_over_a_restart(files: Files, folder: str) -> None:
    tier = await tier_on(files, folder)
    assert await store(tier, range(10))
    assert await load(tier, [0, 20, 9]) == [0, 9]
    tier = await tier_on(files, folder)
    assert await load(tier, list(range(12))) == list(range(10))
    assert await store(tier, range(20, 40))
    total = sum(files.list_folder(folder).values())
    assert total <= DiskWorld(num_segments=3).budget_bytes
    assert await load(tier, list(range(32, 41))) == list(range(32, 40))


# ---- the real one -------------------------------------------------------------------------------


async def test_work_does_not_run_on_the_loops_thread(live: LiveFiles) -> None:
    assert await live.run(threading.get_ident) != threading.get_ident()


async def test_a_cancelled_caller_waits_for_work_that_has_begun(live: LiveFiles) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(5)
        ended.set()

    running = asyncio.create_task(live.run(work))
    waiting = asyncio.create_task(live.run(lambda: pytest.fail("it has been cancelled")))
    await asyncio.to_thread(begun.wait, 5)
    running.cancel()
    waiting.cancel()
    await asyncio.wait([waiting])  # what has not begun never does
    assert not running.done()
    running.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()
    assert waiting.cancelled()


def test_folder_and_files_are_for_their_owner_alone(live: LiveFiles, folder: str) -> None:
    live.lock_folder(folder)
    live.write(f"{folder}/a", 0, parts_of(b"x"))
    live.save(f"{folder}/b", b"x")
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {0o600}


def test_a_folder_that_others_may_enter_is_refused(live: LiveFiles, folder: str) -> None:
    Path(folder).mkdir(parents=True)
    Path(folder).chmod(0o750)
    with pytest.raises(StartError, match=f"{folder}: chmod 700"):
        live.lock_folder(folder)
    Path(folder).chmod(0o700)
    live.lock_folder(folder)


def test_a_path_that_is_no_folder_is_refused(live: LiveFiles, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartError, match=str(path)):
            live.lock_folder(str(path))


def test_another_process_cannot_have_the_folder(live: LiveFiles, folder: str) -> None:
    live.lock_folder(folder)
    live.lock_folder(folder)
    command = [sys.executable, "-c", LOCKER, folder]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"another process uses the folder {folder}" in refused.stderr
    live.close()
    subprocess.run(command, cwd=ROOT, check=True)


async def test_a_limit_of_the_system_is_as_a_full_disk(live: LiveFiles, folder: str) -> None:
    tier = await tier_on(live, folder)
    assert await store(tier, range(2))
    limit = sum(live.list_folder(folder).values()) + 60
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert not await store(tier, [2, 3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tier.stats()["is_failing"]
    assert await load(tier, [0, 1, 2, 3]) == [0, 1]
    assert sum(live.list_folder(folder).values()) == limit  # a torn record
    tier = await tier_on(live, folder)
    assert await load(tier, [0, 1, 2, 3]) == [0, 1]
    assert await store(tier, [2, 3])
    assert await load(tier, [0, 1, 2, 3]) == [0, 1, 2, 3]


async def test_the_secret_is_kept(live: LiveFiles, folder: str) -> None:
    assert await load_or_make_secret(live, folder, lambda: b"one") == b"one"
    assert await load_or_make_secret(live, folder, lambda: b"two") == b"one"
