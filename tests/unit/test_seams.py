"""The live seams: ids, and the end of other processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.seams import LiveProcesses, LiveRng


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its input does."""
    popen = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield popen
    popen.kill()
    popen.communicate()


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def test_the_end_of_a_process_is_told(process: subprocess.Popen[bytes]) -> None:
    before, ended = open_descriptors(), asyncio.Event()
    LiveProcesses().on_exit(process.pid, ended.set)
    await asyncio.sleep(0)
    assert not ended.is_set()
    process.kill()
    await asyncio.wait_for(ended.wait(), 5)
    assert open_descriptors() == before


async def test_a_process_that_has_gone_is_told_soon(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    ended = asyncio.Event()
    LiveProcesses().on_exit(process.pid, ended.set)
    assert not ended.is_set()
    await asyncio.wait_for(ended.wait(), 5)


async def test_who_stops_watching_is_not_told(process: subprocess.Popen[bytes]) -> None:
    before, told = open_descriptors(), []
    stop = LiveProcesses().on_exit(process.pid, lambda: told.append(1))
    other = asyncio.Event()
    LiveProcesses().on_exit(process.pid, other.set)
    stop()
    stop()
    process.kill()
    await asyncio.wait_for(other.wait(), 5)
    assert told == []
    assert open_descriptors() == before


async def test_a_process_that_has_gone_can_be_unwatched(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    told: list[int] = []
    LiveProcesses().on_exit(process.pid, lambda: told.append(1))()
    await asyncio.sleep(0)
    assert told == []


def test_ids_are_128_bits_in_hexadecimal_and_seeds_63_bits() -> None:
    rng = LiveRng()
    ids = {rng.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)
    assert all(0 <= rng.new_seed() < 2**63 for _ in range(100))


def test_a_process_is_told_from_a_later_one_of_its_number(
    process: subprocess.Popen[bytes],
) -> None:
    began = LiveProcesses().started_at(process.pid)
    assert began == LiveProcesses().started_at(process.pid) > 0
    assert LiveProcesses().started_at(os.getpid()) not in (0, began)
    process.kill()
    process.wait()
    assert LiveProcesses().started_at(process.pid) == 0
