"""Workers whose pools copy from each other, with the CPU as their device, and whatever happens to
them: for test_neighbours.py."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.engine.cuda.memory import ArenaFollower
from common.engine.kv_cache import KvCache
from common.kv.hashing import KEY_BYTES
from common.kv.layout import KvLayout

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


def _itself(sharing: HostSharing) -> HostSharing:
    return sharing


@contextlib.contextmanager
def workers(count: int, num_blocks: int = 6, **sharings: HostSharing) -> Iterator[list[Worker]]:
    """`count` of them, and the arena is theirs[0].follower's."""
    arena = memoryview(bytearray(NUM_SLOTS * LAYOUT.block_bytes))
    made = []
    for index in range(count):
        sharing = sharings.get(f"worker_{index}", HostSharing())
        give = partial(_itself, sharing)
        follower = ArenaFollower(LAYOUT, arena, num_blocks, CPU, give)
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
