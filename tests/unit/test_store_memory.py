"""Arena and journal as real files: what is taken over, and what is made anew."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.kv.arena import JOURNAL_SUFFIX, ArenaError
from common.messages import Member
from common.service import Seams
from services.kvstore.blocks import BlockName, BlockPool
from services.kvstore.config import StoreConfig
from services.kvstore.journal import Worker
from services.kvstore.journal_file import Left
from services.kvstore.memory import StoreMemory
from tests.sim.world import World

MODEL, SECRET = b"m" * 32, b"secret"
NUM_BLOCKS, BLOCK_BYTES = 8, 4096
NAME = BlockName(b"key", b"parent", b"tenant")
WORKER = Worker(Member(member_id="a" * 32, role="decode", name="decode.1", host_id="h", pid=1), 5)


@pytest.fixture
def config() -> Iterator[StoreConfig]:
    """Of a store whose arena lies in a folder of shared memory."""
    folder = Path(tempfile.mkdtemp(prefix="kvbaton-test-", dir="/dev/shm"))
    yield StoreConfig(arena_dir=str(folder), kv_bytes=NUM_BLOCKS * BLOCK_BYTES)
    shutil.rmtree(folder)


def live_seams(host_id: str = "host") -> Seams:
    from common.kv.arena import LiveDisk

    return dataclasses.replace(World(1).seams(host_id), disk=LiveDisk())


class Store:
    """Just the memory of one. `die` is what the kernel does when the process has been killed."""

    def __init__(self, config: StoreConfig, host_id: str = "host") -> None:
        self.memory = StoreMemory(config, live_seams(host_id), "f" * 32)
        self.memory.open()

    def serve(self, model: bytes = MODEL, secret: bytes = SECRET) -> Left | None:
        journal, left = self.memory.serve(model, NUM_BLOCKS, secret)
        self.pool = BlockPool(NUM_BLOCKS, journal=journal)
        if journal is not None:
            journal.add_worker(WORKER)
        return left

    def commit(self) -> int:
        """A block with its bytes, as cache."""
        (block,) = self.pool.grant(1, "a handoff")
        self.memory.arena[block * BLOCK_BYTES :][:4] = b"data"
        self.pool.commit(block, NAME)
        self.pool.unpin([block])
        return block

    def die(self) -> None:
        del self.memory, self.pool


def died(config: StoreConfig) -> int:
    """A store that was killed, with one block in its cache."""
    store = Store(config)
    assert store.serve() is None
    block = store.commit()
    store.die()
    return block


def test_blocks_and_their_bytes_are_taken_over(config: StoreConfig) -> None:
    block = died(config)
    store = Store(config)
    assert store.memory.left_secret == SECRET
    left = store.serve()
    assert left is not None
    assert left.workers == [WORKER]
    assert left.recovered.unused == [block]
    assert left.recovered.blocks[block].name == NAME
    assert bytes(store.memory.arena[block * BLOCK_BYTES :][:4]) == b"data"


def test_the_files_are_their_owners_alone_and_go_with_an_orderly_end(config: StoreConfig) -> None:
    store = Store(config)
    store.serve()
    paths = list(Path(config.arena_dir).iterdir())
    assert len(paths) == 2
    assert {path.stat().st_mode & 0o7777 for path in paths} == {0o600}
    store.memory.close()
    assert list(Path(config.arena_dir).iterdir()) == []


def test_an_arena_that_is_to_be_kept_outlives_an_orderly_end(config: StoreConfig) -> None:
    kept = dataclasses.replace(config, keep_arena=True)
    store = Store(kept)
    store.serve()
    block = store.commit()
    store.memory.close()
    del store.pool  # what the process still maps
    successor = Store(kept)
    left = successor.serve()
    assert left is not None
    assert left.recovered.unused == [block]
    assert bytes(successor.memory.arena[block * BLOCK_BYTES :][:4]) == b"data"


def test_one_that_nobody_would_find_is_not_kept(config: StoreConfig) -> None:
    anywhere = dataclasses.replace(config, keep_arena=True, bind="tcp://127.0.0.1:*")
    store = Store(anywhere)
    store.serve()
    store.memory.close()
    assert list(Path(config.arena_dir).iterdir()) == []


def test_a_living_stores_memory_is_left_alone(config: StoreConfig) -> None:
    store = Store(config)
    store.serve()
    block = store.commit()
    other = StoreMemory(config, live_seams(), "e" * 32)
    with pytest.raises(ArenaError, match="give each store its own --name or --bind"):
        other.open()
    other.close()
    assert len(list(Path(config.arena_dir).iterdir())) == 2
    assert bytes(store.memory.arena[block * BLOCK_BYTES :][:4]) == b"data"


@pytest.mark.parametrize(
    "change", [{"model": b"n" * 32}, {"secret": b"another"}], ids=["model", "secret"]
)
def test_of_another_model_or_secret_nothing_is_taken_over(
    config: StoreConfig, change: dict[str, bytes]
) -> None:
    block = died(config)
    store = Store(config)
    before = Path(store.memory.path).stat().st_ino
    assert store.serve(**change) is None
    assert Path(store.memory.path).stat().st_ino != before  # others may write into the former
    assert bytes(store.memory.arena[block * BLOCK_BYTES :][:4]) == bytes(4)
    store.commit()
    store.die()
    assert Store(config).serve(**change) is not None


def test_another_model_after_the_first_begins_another_journal(config: StoreConfig) -> None:
    store = Store(config)
    store.serve()
    store.commit()
    assert store.serve(model=b"n" * 32) is None
    block = store.commit()
    store.die()
    left = Store(config).serve(model=b"n" * 32)
    assert left is not None
    assert left.recovered.unused == [block]


@pytest.mark.parametrize("at", [3, 520], ids=["header", "worker"])
def test_a_damaged_journal_is_not_believed(config: StoreConfig, at: int) -> None:
    died(config)
    (path,) = Path(config.arena_dir).glob("*" + JOURNAL_SUFFIX)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    store = Store(config)
    assert store.serve() is None
    store.commit()


def test_a_truncated_journal_is_not_believed(config: StoreConfig) -> None:
    died(config)
    (path,) = Path(config.arena_dir).glob("*" + JOURNAL_SUFFIX)
    path.write_bytes(path.read_bytes()[:-1])
    assert Store(config).serve() is None


def test_an_arena_of_another_size_is_replaced(config: StoreConfig) -> None:
    died(config)
    larger = dataclasses.replace(config, kv_bytes=config.kv_bytes * 2)
    store = Store(larger)
    assert len(store.memory.arena) == larger.kv_bytes
    assert store.memory.left_secret is None
    assert store.serve() is None


@pytest.mark.parametrize("change", [{"name": "kvstore.2"}, {"bind": "tcp://127.0.0.1:5572"}])
def test_another_stores_memory_is_neither_taken_over_nor_removed(
    config: StoreConfig, change: dict[str, str]
) -> None:
    died(config)
    other = Store(dataclasses.replace(config, **change))  # type: ignore[arg-type]
    assert other.memory.left_secret is None
    other.serve()
    assert Store(config).serve() is not None


def test_nothing_is_taken_over_from_another_boot(config: StoreConfig) -> None:
    died(config)
    assert Store(config, host_id="host after a boot").memory.left_secret is None


def test_a_store_on_any_free_port_has_no_journal_and_leaves_what_others_remove(
    config: StoreConfig,
) -> None:
    anywhere = dataclasses.replace(config, bind="tcp://127.0.0.1:*")
    store = Store(anywhere)
    assert store.serve() is None
    store.commit()
    assert len(list(Path(config.arena_dir).iterdir())) == 1
    path = store.memory.path
    store.die()
    assert Path(path).exists()
    Store(config)
    assert not Path(path).exists()
