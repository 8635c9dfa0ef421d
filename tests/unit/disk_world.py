"""A disk tier over a simulated disk without delays, its clock, and blocks to store."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from services.kvstore.blocks import BlockName
from services.kvstore.disk.format import record_offset
from services.kvstore.disk.tier import DiskTier
from tests.sim.files import SimDrive, SimFiles

FOLDER = "/disk"
BLOCK_BYTES = 48
RECORDS = 4  # of a segment: the fewest
SEGMENT_BYTES = record_offset(RECORDS, BLOCK_BYTES)
OTHER_BYTES = 4096


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


class FakeRng:
    def __init__(self) -> None:
        self._random = random.Random(1)

    def new_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def new_seed(self) -> int:
        return self._random.getrandbits(63)


def key_of(number: int) -> bytes:
    return f"key-{number}".encode()


def name_of(number: int) -> BlockName:
    return BlockName(key_of(number), key_of(number - 1), b"tenant-%d" % (number % 3))


def bytes_of(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


class DiskWorld:
    """One drive; `start` is a new process with a tier on it."""

    def __init__(self, num_segments: int = 4) -> None:
        self.drive = SimDrive(1, latency_s=0, bytes_per_s=1e12)
        self.clock = FakeClock()
        self.rng = FakeRng()
        self.budget_bytes = num_segments * SEGMENT_BYTES + OTHER_BYTES
        self.files = SimFiles(self.drive)

    async def start(self, fingerprint: str = "model") -> DiskTier:
        self.files.close()
        self.files = SimFiles(self.drive)
        tier = DiskTier(
            self.files,
            FOLDER,
            budget_bytes=self.budget_bytes,
            block_bytes=BLOCK_BYTES,
            fingerprint=fingerprint,
            clock=self.clock,
            rng=self.rng,
        )
        await tier.open()
        return tier

    def on_disk(self) -> int:
        return sum(len(content) for content in self.drive.contents.values())

    def paths(self) -> list[str]:
        return sorted(self.drive.contents)


async def store(tier: DiskTier, numbers: Iterable[int]) -> bool:
    return await tier.store([(name_of(n), memoryview(bytes_of(n))) for n in numbers])


async def load(tier: DiskTier, numbers: Sequence[int]) -> list[int]:
    """Which of these are loaded; each as it was stored."""
    memories = [memoryview(bytearray(BLOCK_BYTES)) for _ in numbers]
    entries = [(key_of(n), memory) for n, memory in zip(numbers, memories, strict=True)]
    names = await tier.load(entries)
    loaded = []
    for number, name, memory in zip(numbers, names, memories, strict=True):
        if name is not None:
            assert name == name_of(number)
            assert memory == bytes_of(number)
            loaded.append(number)
        else:
            assert key_of(number) not in tier
    return loaded
