"""A pool that follows an arena, with the CPU as the device: after any history of steps here and
writers elsewhere, a step sees what its sequences' positions hold, and the arena gets it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.cuda.memory import ArenaFollower
from common.engine.cuda.residency import PoolFullError
from common.engine.kv_cache import KvCache
from common.kv.layout import KvLayout

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=2, block_size=4, dtype="float32")
SIZE = LAYOUT.block_size
NUM_SLOTS = 12
DIFFER = torch.arange(1, 1 + 2 * 2 * 2 * 2).view(2, 2, 2, 2).float()  # [layer, K or V, head, dim]


def unnamed(slots: list[int]) -> dict[int, bytes]:
    return dict.fromkeys(slots, b"")


@dataclass(eq=False)
class Held:
    """A sequence: what each of its positions holds, and where. `num_final` blocks are committed."""

    slots: list[int]
    values: list[float] = field(default_factory=list)
    num_final: int = 0


class World:
    """One worker with a pool, and everybody else who reads and writes the arena."""

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        self.arena = memoryview(bytearray(NUM_SLOTS * LAYOUT.block_bytes))
        self.host = KvCache(LAYOUT, self.arena)
        self.host.blocks.fill_(float("nan"))
        self.follower = ArenaFollower(LAYOUT, self.arena, num_blocks, CPU)
        self.rng = rng
        self.free = list(range(NUM_SLOTS))
        self.readers: dict[int, int] = {}  # of final blocks
        self.held: list[Held] = []
        self.counter = 0.0

    def value(self) -> float:
        self.counter += 1
        return self.counter

    def take(self, count: int) -> list[int]:
        """Slots that nobody holds. Others have used them meanwhile."""
        self.rng.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        for slot in taken:
            self.host.blocks[slot] = float("nan")
        return taken

    def fresh(self) -> None:
        """A prompt of which nothing is known."""
        if self.free:
            self.held.append(Held(self.take(1)))

    def handed_over(self) -> None:
        """A sequence that another process computed, its last block unfinished."""
        length = self.rng.randint(1, 3 * SIZE)
        num_blocks = -(-length // SIZE)
        if num_blocks > len(self.free):
            return
        sequence = Held(self.take(num_blocks), num_final=length // SIZE)
        for position in range(length):
            sequence.values.append(self.value())
            self.at(self.host, sequence.slots, position).copy_(DIFFER * sequence.values[-1])
        for slot in sequence.slots[: sequence.num_final]:
            self.readers[slot] = 1
        self.follower.fetch_sync(unnamed(sequence.slots))
        self.held.append(sequence)

    def forked(self) -> None:
        """A prompt that begins like a sequence which is here."""
        if not self.held or not self.free:
            return
        parent = self.rng.choice(self.held)
        shared = parent.slots[: parent.num_final]
        for slot in shared:
            self.readers[slot] += 1
        self.follower.fetch_sync(unnamed(shared))
        values = parent.values[: len(shared) * SIZE]
        self.held.append(Held([*shared, *self.take(1)], values, parent.num_final))

    def step(self) -> None:
        """Some sequences read all they have and get positions more."""
        chosen = [sequence for sequence in self.held if self.rng.random() < 0.7]
        works = []
        for sequence in chosen:
            count = self.rng.choice([1, 1, 2, 5])
            while len(sequence.slots) * SIZE < len(sequence.values) + count:
                if not self.free:
                    break
                sequence.slots += self.take(1)
            room = len(sequence.slots) * SIZE - len(sequence.values)
            if room:
                works.append((sequence, min(count, room)))
        if works:
            self.run(works)

    def run(self, works: list[tuple[Held, int]]) -> None:
        width = max(len(sequence.slots) for sequence, _ in works)
        tables = np.zeros((len(works), width), dtype=np.int32)
        for row, (sequence, _) in zip(tables, works, strict=True):
            row[: len(sequence.slots)] = sequence.slots
        starts = np.array([len(sequence.values) for sequence, _ in works])
        ends = starts + [count for _, count in works]
        try:
            step = self.follower.begin_step(tables, starts, ends)
        except PoolFullError:
            if len(works) > 1:  # as DeviceEngine does
                self.run(works[: len(works) // 2])
                self.run(works[len(works) // 2 :])
            return
        for table, (sequence, count) in zip(step.tables.tolist(), works, strict=True):
            for position, value in enumerate(sequence.values):
                seen = self.at(self.follower.pool, table, position)
                assert torch.equal(seen, DIFFER * value), (position, seen, value)
            for _ in range(count):
                sequence.values.append(self.value())
                position = len(sequence.values) - 1
                keys_values = torch.stack([DIFFER[layer] * self.counter for layer in range(2)])
                for layer in range(2):
                    self.follower.pool.write(
                        layer,
                        keys_values[layer][None],
                        torch.tensor([table[position // SIZE]]),
                        torch.tensor([position % SIZE]),
                    )
        self.follower.end_step(step)

    def commit(self) -> None:
        """What is full becomes final, after it was saved."""
        for sequence in self.held:
            full = len(sequence.values) // SIZE
            new = sequence.slots[sequence.num_final : full]
            self.follower.save_sync(unnamed(new))
            for slot in new:
                self.readers[slot] = 1
            sequence.num_final = full
            self.check_arena(sequence, full * SIZE)

    def end(self) -> None:
        """A sequence is over, perhaps handed over with its unfinished block."""
        if not self.held:
            return
        sequence = self.held.pop(self.rng.randrange(len(self.held)))
        if self.rng.random() < 0.5:
            self.follower.save_sync(unnamed(sequence.slots))
            self.check_arena(sequence, len(sequence.values))
        self.follower.forget(sequence.slots)
        for slot in sequence.slots[: sequence.num_final]:
            self.readers[slot] -= 1
            if not self.readers[slot]:
                self.free.append(slot)
        self.free += sequence.slots[sequence.num_final :]

    def check_arena(self, sequence: Held, length: int) -> None:
        for position, value in enumerate(sequence.values[:length]):
            assert torch.equal(self.at(self.host, sequence.slots, position), DIFFER * value)

    @staticmethod
    def at(cache: KvCache, table: list[int], position: int) -> torch.Tensor:
        return cache.blocks[table[position // SIZE], :, :, :, position % SIZE]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, NUM_SLOTS), length=st.integers(5, 60))
def test_the_pool_seen_through_tables_is_the_arena(seed: int, num_blocks: int, length: int) -> None:
    rng = random.Random(seed)
    world = World(num_blocks, rng)
    actions = [world.fresh, world.handed_over, world.forked, world.commit, world.end]
    for _ in range(length):
        rng.choice([*actions, world.step, world.step, world.step])()
    while world.held:
        world.end()
    assert world.follower._residency.unsaved() == []
    world.follower.close()


async def test_copies_run_on_a_thread_of_their_own() -> None:
    world = World(4, random.Random(0))
    world.handed_over()
    (sequence,) = world.held
    await world.follower.fetch(unnamed(sequence.slots))
    world.run([(sequence, 1)])
    await world.follower.save(unnamed(sequence.slots))
    world.check_arena(sequence, len(sequence.values))
    world.follower.close()


def test_a_failed_load_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4, random.Random(0))
    sequence = Held(world.take(1), [7.0])
    world.at(world.host, sequence.slots, 0).copy_(DIFFER * 7)
    with monkeypatch.context() as broken:
        broken.setattr(world.follower._copier, "copy_in", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.run([(sequence, 1)])
    world.run([(sequence, 1)])
    world.follower.close()


def test_memory_that_is_mapped_elsewhere_is_read_anew() -> None:
    world = World(4, random.Random(0))
    sequence = Held([2], [7.0])
    world.at(world.host, sequence.slots, 0).copy_(DIFFER * 7)
    world.follower.fetch_sync(unnamed([2]))
    with world.follower.replacing(world.arena[2 * LAYOUT.block_bytes :]):
        world.host.blocks[2].mul_(2)
    sequence.values[0] = 14.0
    world.run([(sequence, 1)])
    world.follower.close()
