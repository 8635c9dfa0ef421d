"""Places in a worker's memory by value: whole pages, whole blocks, side by side."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.worker.memory import WorkerMemory


class FakeDisk:
    """Remembers what was mapped where."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, str, int]] = []

    def create_arena(self, path: str, num_bytes: int) -> memoryview:
        raise NotImplementedError

    def open_arena(self, path: str, num_bytes: int = 0) -> memoryview | None:
        raise NotImplementedError

    def sweep_arenas(self, folder: str, *, keep_journaled: bool = False) -> list[str]:
        raise NotImplementedError

    def remove_arena(self, path: str) -> None:
        raise NotImplementedError

    def reserve(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def map_into(self, memory: memoryview, offset: int, path: str, most_bytes: int) -> None:
        self.mapped.append((offset, path, most_bytes))


@given(
    st.sampled_from([512, 4096, 6000, 12288]),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_place_holds_its_blocks_and_begins_at_a_page_and_at_a_block(
    block_bytes: int, num_blocks: list[int]
) -> None:
    disk = FakeDisk()
    memory = WorkerMemory(disk, block_bytes, max(num_blocks), len(num_blocks))
    for store, count in enumerate(num_blocks):
        memory.map(store, f"arena-{store}")
        place = memory.place(store)
        assert place.nbytes >= count * block_bytes
        offset, path, most_bytes = disk.mapped[store]
        assert (path, most_bytes) == (f"arena-{store}", place.nbytes)
        assert offset % 4096 == 0
        assert memory.first_slot(store) * block_bytes == offset
        place[:1] = bytes([store + 1])
    assert memory.all.nbytes == sum(memory.place(store).nbytes for store in range(len(num_blocks)))
    assert bytes(
        memory.all[memory.first_slot(store) * block_bytes] for store in range(len(num_blocks))
    ) == bytes(range(1, len(num_blocks) + 1))


@pytest.mark.parametrize(
    ("block_bytes", "num_blocks", "place_bytes"),
    [(4096, 3, 3 * 4096), (2048, 3, 2 * 4096), (6000, 1, 1536000)],
)
def test_a_place_is_as_large_as_its_blocks_and_pages_need(
    block_bytes: int, num_blocks: int, place_bytes: int
) -> None:
    memory = WorkerMemory(FakeDisk(), block_bytes, num_blocks, 2)
    assert memory.place(0).nbytes == place_bytes
