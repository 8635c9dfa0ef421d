"""The journal by value: what is torn or damaged is never believed, and a crash at any moment leaves
no block to be found, or given away, that somebody uses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Member
from services.kvstore.blocks import Block, BlockName, BlockPool, BlockState
from services.kvstore.formers import Formers
from services.kvstore.journal import (
    FREE,
    IN_USE,
    UNUSED,
    WRITTEN,
    Header,
    JournalError,
    Record,
    Word,
    Worker,
    pack_header,
    pack_record,
    pack_word,
    pack_worker,
    recover,
    unpack_header,
    unpack_record,
    unpack_word,
    unpack_worker,
)
from services.kvstore.journal_file import Journal, journal_bytes
from services.kvstore.staging import Staging

NUM_BLOCKS = 3
KNOWN, OTHER = "a" * 32, "b" * 32  # members that map the arena
KEYS = [bytes([number]) * 32 for number in range(1, 7)]

keys = st.binary(min_size=1, max_size=32)
names = st.builds(BlockName, keys, st.binary(max_size=32), st.binary(max_size=32))
block_ids = st.integers(0, 2**24)


def worker(member_id: str = KNOWN, endpoint: str = "tcp://127.0.0.1:1") -> Worker:
    member = Member(
        member_id=member_id, role="decode", name="decode.1", host_id="host", pid=7,
        endpoint=endpoint,
    )  # fmt: skip
    return Worker(member, 12345)


def flipped(raw: bytes, bit: int) -> bytes:
    number = int.from_bytes(raw, "little") ^ 1 << bit % (8 * len(raw))
    return number.to_bytes(len(raw), "little")


# ---- bytes ------------------------------------------------------------------------------------


@given(block_ids, st.integers(0, 2**63 - 1), names, names, st.integers(0, 2**16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_record_that_is_damaged_says_nothing(
    block_id: int, stamp: int, old: BlockName, new: BlockName, at: int
) -> None:
    before, after = pack_record(block_id, 1, old), pack_record(block_id, stamp, new)
    assert unpack_record(block_id, after) == Record(stamp, new)
    assert unpack_record(block_id, flipped(after, at)) is None
    assert unpack_record(block_id, after[: at % len(after)]) is None
    assert unpack_record(block_id + 1, after) is None
    assert unpack_record(block_id, bytes(len(after))) is None
    torn = after[: at % len(after)] + before[at % len(after) :]
    assert torn in (before, after) or unpack_record(block_id, torn) is None


@given(
    block_ids,
    st.sampled_from([WRITTEN, FREE, IN_USE, UNUSED]),
    st.integers(0, 2**46 - 1),
    st.integers(0, 63),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_word_that_is_damaged_says_that_the_block_may_be_being_written(
    block_id: int, use: int, value: int, bit: int
) -> None:
    word = pack_word(block_id, use, value)
    assert 0 <= word < 2**64
    assert unpack_word(block_id, word) == Word(use, value)
    assert unpack_word(block_id, word ^ 1 << bit).use == WRITTEN
    assert unpack_word(block_id, 0).use == WRITTEN


@given(st.integers(0, 2**16))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_damaged_header_is_none(at: int) -> None:
    header = Header(1000, b"m" * 32, b"secret")
    raw = pack_header(header)
    assert unpack_header(raw) == header
    assert unpack_header(flipped(raw, at)) is None
    assert unpack_header(raw[: at % len(raw)]) is None
    assert unpack_header(bytes(len(raw))) is None


@given(st.integers(1, 2**16))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_with_a_damaged_worker_nothing_is_believed(at: int) -> None:
    raw = pack_worker(worker())
    read = unpack_worker(raw)
    assert read == worker()
    assert unpack_worker(bytes(len(raw))) is None
    for damaged in (
        flipped(raw, at),
        raw[: at % len(raw) or 1] + bytes(len(raw) - (at % len(raw) or 1)),
    ):
        if damaged == raw:
            continue  # it was cut where nothing stands any more
        with pytest.raises(JournalError):
            unpack_worker(damaged)


# ---- recovery ---------------------------------------------------------------------------------


def final(number: int, stamp: int = 1) -> Record:
    return Record(stamp, BlockName(KEYS[number], KEYS[0], b"tenant"))


def test_what_is_final_is_found_and_stamps_go_on_above_the_highest() -> None:
    words = [Word(UNUSED, 7), Word(FREE, 9), Word(WRITTEN, 0), Word(UNUSED, 8)]
    recovered = recover(words, [final(1, stamp=4), None, None, final(2)], [])
    assert recovered.unused == [3, 0]  # the last used first
    assert recovered.in_use == recovered.in_doubt == []
    assert [block.stamp for block in recovered.blocks] == [4, 9, 9, 1]
    assert [block.state for block in recovered.blocks] == [
        BlockState.COMMITTED, BlockState.FREE, BlockState.FREE, BlockState.COMMITTED,
    ]  # fmt: skip


def test_what_may_be_used_waits_for_those_who_may_use_it() -> None:
    words = [Word(each, 1) for each in (WRITTEN, WRITTEN, IN_USE, IN_USE, UNUSED, FREE)]
    records = [None, final(1), None, final(1), final(2), final(3)]
    recovered = recover(words, records, [KNOWN, OTHER])
    assert recovered.in_doubt == [0, 1, 2]
    assert {recovered.blocks[block].writer for block in recovered.in_doubt} == {KNOWN}
    assert (recovered.in_use, recovered.unused) == ([3], [4])
    assert recovered.blocks[5] == Block(stamp=1)


def test_without_anybody_who_may_use_it_all_that_cannot_be_found_is_free() -> None:
    words = [Word(each, 1) for each in (WRITTEN, IN_USE, FREE, IN_USE)]
    recovered = recover(words, [None, None, None, final(1)], [])
    assert [block.state for block in recovered.blocks] == [BlockState.FREE] * 3 + [
        BlockState.COMMITTED
    ]
    assert recovered.unused == [3]


def test_of_two_blocks_of_one_name_one_is_found() -> None:
    recovered = recover([Word(UNUSED, 3), Word(UNUSED, 4)], [final(1), final(1)], [])
    assert [block.state for block in recovered.blocks] == [BlockState.COMMITTED, BlockState.FREE]


def test_blocks_in_doubt_are_free_when_the_last_has_stopped() -> None:
    words = [Word(WRITTEN, 1), Word(WRITTEN, 0), Word(IN_USE, 0), Word(UNUSED, 3)]
    ids = [KNOWN, OTHER]
    pool = BlockPool(len(words))
    staging = Staging(pool)
    recovered = recover(words, [None, None, final(1), final(2)], ids)
    formers = Formers(pool, staging, recovered, ids)
    pool.check()
    assert pool.counts() == {
        "free": 0, "granted": 0, "committed": 1, "cached": 1, "quarantined": 2,
    }  # fmt: skip
    formers.stopped(KNOWN)
    assert pool.written_by(KNOWN) == []
    assert pool.written_by(OTHER) == [0, 1]
    assert staging.pinned == [2]
    formers.stopped("c" * 32)
    assert staging.pinned == [2]
    formers.stopped(OTHER)
    pool.free(pool.written_by(OTHER))
    pool.check()
    assert (pool.num_free, pool.num_available, staging.pinned) == (2, 4, [])
    assert pool.lookup([KEYS[1], KEYS[2]]) == [2, 3]


# ---- a crash at any moment --------------------------------------------------------------------


class Crash(Exception):  # noqa: N818 - nothing is wrong with the code that meets it
    """The store was killed."""


class Death:
    """The store is killed at the n-th write to its journal; a `share` of its bytes are there, or
    none if it is a word."""

    def __init__(self, num_writes: int, share: float) -> None:
        self.num_writes = num_writes
        self.share = share


class MortalMemory:
    """As a memoryview, until then."""

    def __init__(self, memory: memoryview, death: Death) -> None:
        self._memory = memory
        self._death = death

    def __setitem__(self, place: int | slice, value: Any) -> None:
        self._death.num_writes -= 1
        if not self._death.num_writes:
            if isinstance(place, slice):
                size = int(self._death.share * len(value))
                self._memory[place.start : place.start + size] = value[:size]
            raise Crash
        self._memory[place] = value


def journal_that_dies(memory: memoryview, death: Death) -> Journal:
    """A new journal, with one worker."""
    journal = Journal(memory, NUM_BLOCKS)
    journal.begin(Header(NUM_BLOCKS, b"m" * 32, b""))
    journal.add_worker(worker())
    journal._memory = MortalMemory(memory, death)  # type: ignore[assignment]
    journal._words = MortalMemory(journal._words, death)  # type: ignore[assignment]
    return journal


def step(pool: BlockPool, data: st.DataObject) -> tuple[str, int, BlockName | None]:
    """What the pool is to do next, and with which block."""
    block_id = data.draw(st.integers(0, NUM_BLOCKS - 1))
    match pool[block_id].state:
        case BlockState.GRANTED:
            kind = data.draw(st.sampled_from(["commit", "commit", "hand_on", "free", "quarantine"]))
        case BlockState.QUARANTINED:
            kind = "free"
        case BlockState.COMMITTED:
            kind = data.draw(st.sampled_from(["unpin", "unpin", "pin", "discard"]))
        case BlockState.CACHED:
            kind = data.draw(st.sampled_from(["pin", "discard", "grant"]))
        case _:
            kind = "grant"
    number = data.draw(st.integers(1, len(KEYS) - 1))
    return kind, block_id, BlockName(KEYS[number], KEYS[number - 1], b"tenant")


def carry_out(pool: BlockPool, kind: str, block_id: int, name: BlockName | None) -> None:
    if kind == "grant":
        pool.grant(1, KNOWN)
    elif kind == "commit":
        pool.commit(block_id, name)
    elif kind == "hand_on":
        pool.hand_on(block_id, OTHER)
    elif kind == "discard":
        pool.discard(block_id)
    else:
        getattr(pool, kind)([block_id])


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_crash_leaves_nothing_to_be_found_or_given_away_that_is_in_use(
    data: st.DataObject,
) -> None:
    memory = memoryview(bytearray(journal_bytes(NUM_BLOCKS)))
    death = Death(data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0, 0.1, 0.5, 0.9, 1])))
    journal = journal_that_dies(memory, death)
    pool = BlockPool(NUM_BLOCKS, journal=journal)
    kind, target, name = "", -1, None
    try:
        while True:
            told = [Block(b.state, b.writer, b.name, b.num_readers) for b in pool._blocks]
            kind, target, name = step(pool, data)
            carry_out(pool, kind, target, name)
    except Crash:
        pass
    left = Journal(memory, NUM_BLOCKS).take_over()
    assert [each.member.member_id for each in left.workers] == [KNOWN]
    for block_id, (before, after) in enumerate(zip(told, left.recovered.blocks, strict=True)):
        # What the outside had been told, and what it had said itself.
        is_done = block_id == target and kind in ("commit", "free", "unpin", "discard")
        is_written = bool(before.writer) and not is_done
        is_read = before.num_readers > 1 or (before.num_readers == 1 and not is_done)
        if after.name is not None:
            was = name if block_id == target and kind == "commit" else before.name
            assert after.name == was
            assert not is_written
        if after.state is BlockState.FREE or block_id in left.recovered.unused:
            assert not is_written
            assert not is_read
        if before.name is not None and block_id != target and kind != "grant":
            assert after.name == before.name


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_between_two_operations_all_that_could_be_found_is_found(data: st.DataObject) -> None:
    memory = memoryview(bytearray(journal_bytes(NUM_BLOCKS)))
    journal = Journal(memory, NUM_BLOCKS)
    journal.begin(Header(NUM_BLOCKS, b"m" * 32, b""))
    pool = BlockPool(NUM_BLOCKS, journal=journal)
    for _ in range(data.draw(st.integers(0, 25))):
        carry_out(pool, *step(pool, data))
    recovered = Journal(memory, NUM_BLOCKS).take_over().recovered
    assert [block.name for block in recovered.blocks] == [block.name for block in pool._blocks]
    for before, after in zip(pool._blocks, recovered.blocks, strict=True):
        assert after.stamp == before.stamp or after.stamp > before.stamp > 0
    assert sorted(recovered.unused) == [
        block_id for block_id in range(NUM_BLOCKS) if pool[block_id].name is not None
    ]
