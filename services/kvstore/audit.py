"""The audit of a store: do its counts follow from the owners, and do the holders agree. Pure.

What a worker says is compared with what the store held to be true when it asked, and when the
answer came. Messages keep their order, so a block that was granted at both moments is known to the
worker, and one that the worker holds was granted at one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.messages import HeldSequence, Holdings
from services.kvstore.blocks import BlockPool, BlockState
from services.kvstore.handoff import HandoffState
from services.kvstore.ledger import Ledger
from services.kvstore.staging import WRITER as DISK

_WRITTEN = (BlockState.GRANTED, BlockState.QUARANTINED)


# ---- the store's own books --------------------------------------------------------------------


def check_books(ledger: Ledger, is_member: Callable[[str], bool]) -> list[str]:
    """Every discrepancy in words. `is_member(id)`: the id is a member's, or a lost one's that may
    still write."""
    pool = ledger.pool
    return [
        *_check_counts(pool),
        *_check_readers(ledger),
        *_check_writers(ledger, is_member),
        *_check_tables(ledger),
        *_check_reservations(ledger),
        *_check_names(pool),
    ]


def _check_counts(pool: BlockPool) -> Iterator[str]:
    counts = pool.counts()
    found = Counter(pool[block_id].state.value for block_id in range(pool.num_blocks))
    for state, count in counts.items():
        if count != found[state]:
            yield f"{count} blocks are counted as {state}, {found[state]} are in that state"
    if sum(counts.values()) != pool.num_blocks:
        yield f"the counts add up to {sum(counts.values())}, there are {pool.num_blocks} blocks"
    if pool.num_free != found["free"]:
        yield f"{pool.num_free} blocks can be granted as free, {found['free']} are free"
    num_evictable = pool.num_available - pool.num_free
    if num_evictable != found["cached"]:
        yield f"{num_evictable} blocks can be evicted, {found['cached']} are cached"


def _check_readers(ledger: Ledger) -> Iterator[str]:
    readers = ledger.readers()
    for block_id in range(ledger.pool.num_blocks):
        block = ledger.pool[block_id]
        if block.num_readers != readers[block_id]:
            yield (
                f"block {block_id} counts {block.num_readers} readers, handoffs and the disk "
                f"account for {readers[block_id]}"
            )
        if bool(block.num_readers) != (block.state is BlockState.COMMITTED):
            yield f"block {block_id} is {block.state.value} with {block.num_readers} readers"


def _check_writers(ledger: Ledger, is_member: Callable[[str], bool]) -> Iterator[str]:
    granted = {
        handoff.handoff_id: set(handoff.blocks[handoff.num_committed :])
        for handoff in ledger.handoffs.values()
    }
    for block_id in range(ledger.pool.num_blocks):
        block = ledger.pool[block_id]
        if bool(block.writer) != (block.state in _WRITTEN):
            writer = block.writer or "nobody"
            yield f"block {block_id} is {block.state.value} and written by {writer}"
        elif not block.writer or block.writer == DISK or is_member(block.writer):
            continue
        elif block.writer not in granted:
            yield (
                f"block {block_id} is {block.state.value} because of {block.writer}, which is "
                "neither a handoff nor a member"
            )
        elif block_id not in granted[block.writer]:
            yield (
                f"block {block_id} is granted to handoff {block.writer}, whose table does not "
                "hold it"
            )


def _check_tables(ledger: Ledger) -> Iterator[str]:
    """Before decode has claimed, the blocks of a table are its handoff's own. Afterwards they are
    decode's, which gives them back before it says that it is done."""
    for handoff in ledger.handoffs.values():
        if handoff.state in (HandoffState.FILLING, HandoffState.SEALED):
            for block_id in handoff.blocks[handoff.num_committed :]:
                if not ledger.pool.is_granted(block_id, handoff.handoff_id):
                    yield (
                        f"handoff {handoff.handoff_id} lists block {block_id}, which is not "
                        "granted to it"
                    )


def _check_reservations(ledger: Ledger) -> Iterator[str]:
    reserved = sum(handoff.num_reserved for handoff in ledger.handoffs.values())
    if reserved != ledger.num_reserved:
        yield f"{ledger.num_reserved} blocks are counted as reserved, handoffs reserve {reserved}"
    if ledger.num_reserved > ledger.pool.num_available:
        yield (
            f"{ledger.num_reserved} blocks are reserved, {ledger.pool.num_available} could be "
            "granted"
        )


def _check_names(pool: BlockPool) -> Iterator[str]:
    for block_id in range(pool.num_blocks):
        name = pool[block_id].name
        if name is not None and pool.find(name.key) != block_id:
            yield f"block {block_id} has a key that finds block {pool.find(name.key)}"


# ---- what a worker says -------------------------------------------------------------------------


class HeldTable(NamedTuple):
    """A handoff that a member holds, as the store sees it."""

    epoch: int
    blocks: tuple[int, ...]
    num_committed: int
    is_aborting: bool


class View(NamedTuple):
    """What a member holds, as the store sees it. `writable`: the blocks that it may write, or may
    still be writing, with their stamps."""

    writable: dict[int, int]
    tables: dict[str, HeldTable]


def view_of(ledger: Ledger, member_id: str) -> View:
    """What the store holds to be true of a member now."""
    pool = ledger.pool
    writable = pool.written_by(member_id)
    tables = {}
    for handoff in ledger.handoffs.values():
        if handoff.writer != member_id:
            continue
        tables[handoff.handoff_id] = HeldTable(
            handoff.epoch,
            tuple(handoff.blocks),
            handoff.num_committed,
            handoff.state is HandoffState.ABORTING,
        )
        rest = handoff.blocks[handoff.num_committed :]
        writable += [each for each in rest if pool[each].writer == handoff.handoff_id]
    return View({block_id: pool[block_id].stamp for block_id in writable}, tables)


def compare(asked: View, said: Holdings, answered: View) -> list[str]:
    """Every discrepancy in words between a worker and the store's views of it when the store asked
    and when it was answered."""
    return [*_compare_blocks(asked, said, answered), *_compare_tables(asked, said, answered)]


def _compare_blocks(asked: View, said: Holdings, answered: View) -> Iterator[str]:
    writable = Counter(said.spare)
    known = set(said.spare)
    for sequence in said.sequences:
        writable.update(sequence.blocks[sequence.num_committed :])
        known.update(sequence.blocks)
    for block_id, stamp in asked.writable.items():
        if answered.writable.get(block_id) == stamp and block_id not in known:
            yield f"the store has granted it block {block_id}, which it does not know of"
    for block_id, count in writable.items():
        if block_id not in asked.writable and block_id not in answered.writable:
            yield f"it may write block {block_id} as it says, which is not granted to it"
        if count > 1:
            yield f"it holds block {block_id} in {count} places"


def _compare_tables(asked: View, said: Holdings, answered: View) -> Iterator[str]:
    sequences = {sequence.handoff_id: sequence for sequence in said.sequences}
    for handoff_id, before in asked.tables.items():
        after = answered.tables.get(handoff_id)
        if after is not None and after.epoch == before.epoch and handoff_id not in sequences:
            yield f"the store has it hold handoff {handoff_id}, which it does not know of"
    for handoff_id, sequence in sequences.items():
        if not sequence.blocks:
            continue  # it has asked for nothing yet, or given all up
        tables = [
            table
            for view in (asked, answered)
            if (table := view.tables.get(handoff_id)) and table.epoch == sequence.epoch
        ]
        if not tables:
            yield f"it works on handoff {handoff_id}, of which the store knows nothing"
        elif not any(table.is_aborting for table in tables):
            yield from _compare_final(sequence, tables)


def _compare_final(sequence: HeldSequence, tables: list[HeldTable]) -> Iterator[str]:
    first, last = tables[0], tables[-1]
    if sequence.num_committed < first.num_committed:
        yield (
            f"it has {sequence.num_committed} final blocks of handoff {sequence.handoff_id}, the "
            f"store {first.num_committed}"
        )
    num_final = min(sequence.num_committed, last.num_committed)
    if tuple(sequence.blocks[:num_final]) != last.blocks[:num_final]:
        yield f"the final blocks of handoff {sequence.handoff_id} are others than the store's"
