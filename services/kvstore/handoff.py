"""One handoff: its record, its steps, and who may take them. Pure.

waiting -> reserved -> filling -> sealed -> claimed -> released, or aborted from anywhere. Who may
write is always one member: prefill while filling, decode once it has claimed. A step repeated gives
the same state again; one that is not due raises StaleError and changes nothing.

A handoff that its workers lost or gave up is held: what is computed of it waits for its gateway, to
go on from there in another handoff.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from common.messages import StaleError
from services.kvstore.blocks import BlockName, BlockPool


class HandoffState(StrEnum):
    """Where a handoff stands."""

    WAITING = "waiting"
    RESERVED = "reserved"
    FILLING = "filling"
    SEALED = "sealed"
    CLAIMED = "claimed"
    ABORTING = "aborting"
    HELD = "held"


_BEFORE_SEAL = (HandoffState.WAITING, HandoffState.RESERVED, HandoffState.FILLING)
OVER = (HandoffState.ABORTING, HandoffState.HELD)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What a gateway asks for. `keys` are those of the prompt's full blocks, after `root_key`;
    `after` is the handoff to go on from."""

    request_id: str
    gateway_id: str
    prefill_id: str
    decode_id: str
    tenant: bytes
    root_key: bytes
    keys: list[bytes]
    num_tokens: int
    after: str = ""
    trace_id: str = ""


@dataclass(slots=True, eq=False)
class Handoff:
    """One request's KV on its way. `blocks[:num_committed]` are final and pinned by this handoff;
    the rest are granted to the handoff itself, until decode claims them for its lease."""

    handoff_id: str
    epoch: int
    request_id: str
    gateway_id: str
    prefill_id: str
    decode_id: str
    tenant: bytes
    root_key: bytes
    keys: list[bytes]  # of the prompt's full blocks, then of those that decode filled
    num_tokens: int
    state: HandoffState = HandoffState.WAITING
    blocks: list[int] = field(default_factory=list)
    num_committed: int = 0
    num_cached: int = 0
    num_loaded: int = 0  # blocks that came from the disk for it
    num_reserved: int = 0
    writer: str = ""
    is_fenced: bool = False  # once aborting: the gateway takes nothing of it any more
    is_kept: bool = False  # once aborting or held: its gateway may go on from what is final
    trace_id: str = ""  # for logs
    num_computed: int = 0  # positions, if the unfinished last block is final too: held or sealed

    def needs(self, member_id: str) -> bool:
        """Whether the handoff cannot go on without this member."""
        if self.state is HandoffState.HELD:
            return member_id == self.gateway_id
        if member_id == self.prefill_id and self.state in _BEFORE_SEAL:
            return True
        return member_id in (self.gateway_id, self.decode_id)

    def expect(self, state: HandoffState) -> None:
        """Raise StaleError unless the handoff is in this state."""
        if self.state is not state:
            raise StaleError(f"this handoff is {self.state.value}, not {state.value}")

    def expect_writer(self, member_id: str) -> None:
        """Raise StaleError unless the member is the one that may write."""
        if self.writer != member_id:
            raise StaleError("the sender is not the writer of this handoff")

    def fill(self, pool: BlockPool, member_id: str) -> int:
        """Grant what is reserved to a worker of this handoff; returns the number of blocks."""
        by_decode = member_id == self.decode_id
        if member_id not in (self.prefill_id, self.decode_id):
            raise StaleError("not the worker this handoff was opened for")
        after = HandoffState.CLAIMED if by_decode else HandoffState.FILLING
        if self.state is after and self.writer == member_id:
            return 0
        self.expect(HandoffState.RESERVED)
        num_granted = self.num_reserved
        self.blocks += pool.grant(num_granted, member_id if by_decode else self.handoff_id)
        self.num_reserved = 0
        self.state = after
        self.writer = member_id
        return num_granted

    def commit(
        self,
        pool: BlockPool,
        member_id: str,
        *,
        first_index: int,
        blocks: list[int],
        keys: list[bytes],
    ) -> None:
        """Blocks of the writer are final. Without `keys` those of the prompt hold."""
        self.expect_writer(member_id)
        end = first_index + len(blocks)
        if end <= self.num_committed and self.blocks[first_index:end] == blocks:
            return  # said before
        known_keys, table = self.keys[first_index:end], self.blocks[first_index:end]
        keys = keys or known_keys
        if first_index != self.num_committed or len(keys) != len(blocks):
            raise StaleError("commits must follow one another, each block with its key")
        if keys[: len(known_keys)] != known_keys or blocks[: len(table)] != table:
            raise StaleError("blocks or keys other than those of this handoff")
        self._expect_granted(pool, member_id, blocks)
        if len(set(blocks)) != len(blocks):
            raise StaleError("a block can be committed only once")
        self.keys += keys[len(known_keys) :]
        for index, block_id in enumerate(blocks, first_index):
            pool.commit(block_id, self._name(index))
        self.blocks[first_index:end] = blocks
        self.num_committed = end

    def commit_late(
        self, pool: BlockPool, member_id: str, *, first_index: int, blocks: list[int]
    ) -> None:
        """Decode says of an aborted handoff that blocks are final: they leave its lease, and are
        never found. Once it is fenced what it read may have been reused: they are nobody's."""
        self.expect_writer(member_id)
        self._expect_granted(pool, member_id, blocks)
        if len(set(blocks)) != len(blocks):
            raise StaleError("a block can be committed only once")
        if first_index != self.num_committed and not self.is_fenced:
            raise StaleError("commits must follow one another")
        for block_id in blocks:
            pool.commit(block_id, None)
        if self.is_fenced:
            pool.unpin(blocks)
        else:
            self.blocks[first_index : first_index + len(blocks)] = blocks
            self.num_committed += len(blocks)

    def _name(self, index: int) -> BlockName:
        parent = self.keys[index - 1] if index else self.root_key
        return BlockName(self.keys[index], parent, self.tenant)

    def key_of(self, index: int) -> bytes:
        """What a block's digest is bound to: its key, or its parent's while it is unfinished."""
        return self.keys[min(index, len(self.keys) - 1)] if self.keys else self.root_key

    def check_writer(self, pool: BlockPool, member_id: str, blocks: list[int]) -> None:
        """Raise StaleError unless the member may write these blocks now."""
        self.expect_writer(member_id)
        self._expect_granted(pool, member_id, blocks)

    def _expect_granted(self, pool: BlockPool, member_id: str, blocks: list[int]) -> None:
        owner = member_id if member_id == self.decode_id else self.handoff_id
        for block_id in blocks:
            if not pool.is_granted(block_id, owner):
                raise StaleError(f"block {block_id} is not the sender's to write")

    def readable(self, member_id: str, indexes: list[int]) -> list[int]:
        """The blocks at these places, which the member may read: final ones, and once it has
        claimed the handoff also the unfinished last one. Raises StaleError for others."""
        if member_id not in (self.prefill_id, self.decode_id):
            raise StaleError("not a worker of this handoff")
        claimed = self.state is HandoffState.CLAIMED and self.writer == member_id
        num_readable = len(self.blocks) if claimed else self.num_committed
        if max(indexes, default=0) >= num_readable:
            raise StaleError("blocks that this handoff does not hold")
        return [self.blocks[index] for index in indexes]

    def hand_back(
        self, pool: BlockPool, member_id: str, *, num_tokens: int, blocks: list[int]
    ) -> None:
        """Decode hands on what it has computed: its unfinished block becomes the handoff's own."""
        self.check_writer(pool, member_id, blocks)
        for block_id in blocks:
            pool.hand_on(block_id, self.handoff_id)
        self.blocks[self.num_committed :] = blocks
        self.num_computed = num_tokens
        self.writer = ""
        self.is_kept = True
        self.state = HandoffState.HELD

    def go_on_from(self, former: Handoff, pool: BlockPool, most_blocks: int) -> None:
        """Take over what another computed of the same tokens, up to `most_blocks` full blocks; all
        of it, with the unfinished block, where it is whole: then there is nothing to fill."""
        num_same = self._num_same(former, pool)
        is_same = num_same == former.num_committed and former.num_computed > 0
        is_whole = is_same and former.num_computed == self.num_tokens - 1
        num_kept = num_same if is_whole else min(num_same, most_blocks)
        pool.unpin(former.blocks[num_kept : former.num_committed])
        self.epoch = former.epoch + 1
        self.blocks = former.blocks[:num_kept]
        self.num_committed = self.num_cached = num_kept
        if is_whole:
            rest = former.blocks[former.num_committed :]
            for block_id in rest:
                pool.hand_on(block_id, self.handoff_id)
            self.blocks += rest
            self.num_tokens = self.num_computed = former.num_computed
            del self.keys[num_same:]
            self.state = HandoffState.SEALED
        former.blocks = [] if is_whole else former.blocks[former.num_committed :]
        former.num_committed = former.num_computed = 0

    def _num_same(self, former: Handoff, pool: BlockPool) -> int:
        """How many of its final blocks are of these tokens, and sound."""
        keys = zip(self.keys, former.keys[: former.num_committed], strict=False)
        num_same = 0
        for block_id, (mine, theirs) in zip(former.blocks, keys, strict=False):
            if mine != theirs or pool[block_id].is_corrupt:
                break
            num_same += 1
        return num_same

    def claim(self, pool: BlockPool, member_id: str) -> None:
        """Decode takes over; the unfinished last block joins its lease."""
        if member_id != self.decode_id:
            raise StaleError("not the decode worker this handoff was opened for")
        if self.state is HandoffState.CLAIMED:
            return
        self.expect(HandoffState.SEALED)
        for block_id in self.blocks[self.num_committed :]:
            pool.hand_on(block_id, member_id)
        self.num_computed = 0
        self.state = HandoffState.CLAIMED
        self.writer = member_id

    def unpin(self, pool: BlockPool) -> None:
        """Nothing that is read for this handoff counts any more."""
        pool.unpin(self.blocks[: self.num_committed])
        del self.blocks[: self.num_committed]
        self.num_committed = 0

    def hold(self, pool: BlockPool) -> None:
        """Keep what is final for the gateway, and the unfinished last block if it is whole."""
        rest = self.blocks[self.num_committed :]
        if not self.num_computed:
            if self.writer != self.decode_id:
                pool.free(rest)
            del self.blocks[self.num_committed :]
        self.num_reserved = 0
        self.writer = ""
        self.state = HandoffState.HELD

    def drop_blocks(self, pool: BlockPool) -> None:
        """Unpin what is committed, free what is granted; decode's blocks stay in its lease."""
        self.num_reserved = self.num_computed = 0
        self.unpin(pool)
        if self.writer != self.decode_id:
            pool.free(self.blocks)
        self.blocks = []
        self.writer = ""
