"""The ledger: all handoffs and leases of a store; every block has an owner. Pure.

Each handoff is a row of the state machine in handoff.py. An epoch rises with each new owner of a
handoff; a message from an older epoch is refused and changes nothing.

Room is promised before work begins: see room.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from common.messages import StaleError
from kvbaton.errors import InvalidRequestError, OverloadedError, TooLargeError, UnprocessableError
from services.kvstore.blocks import BlockPool, BlockState
from services.kvstore.handoff import OVER, Handoff, HandoffState, OpenRequest
from services.kvstore.room import Room
from services.kvstore.staging import Staging


class Ledger(Room):
    """Blocks and handoffs of one store. `new_id` makes handoff ids."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        new_id: Callable[[], str],
        *,
        growth_blocks: int,
        prefix_cache: bool = True,
        max_waiting: int = 4096,
    ) -> None:
        super().__init__(pool, block_size, growth_blocks=growth_blocks, prefix_cache=prefix_cache)
        self.staging = Staging(pool)
        self._new_id = new_id
        self._max_waiting = max_waiting

    # ---- opening ------------------------------------------------------------------------------

    def open(self, request: OpenRequest) -> Handoff:
        """A new handoff, not in the line for room before `line_up`; `admit` tells when it has it.
        Raises as `check_open` does."""
        self.check_open(request)
        handoff = Handoff(
            handoff_id=self._new_id(),
            epoch=1,
            request_id=request.request_id,
            gateway_id=request.gateway_id,
            prefill_id=request.prefill_id,
            decode_id=request.decode_id,
            tenant=request.tenant,
            root_key=request.root_key,
            keys=list(request.keys),
            num_tokens=request.num_tokens,
            trace_id=request.trace_id,
        )
        self.handoffs[handoff.handoff_id] = self._preparing[handoff.handoff_id] = handoff
        former = self.handoffs.get(request.after)
        if former is not None and former.gateway_id == request.gateway_id:
            self._go_on(handoff, former)
        return handoff

    def check_open(self, request: OpenRequest) -> None:
        """Raises InvalidRequestError if the prompt can never fit, OverloadedError if too many wait,
        UnprocessableError if the numbers of tokens and keys cannot be."""
        num_full = request.num_tokens // self.block_size
        if request.num_tokens < 1 or len(request.keys) > num_full:
            raise UnprocessableError(
                f"num_tokens must be at least 1 and fill a block for each key, got "
                f"{request.num_tokens} tokens and {len(request.keys)} keys",
                field="num_tokens",
            )
        num_blocks = self._blocks_for(request.num_tokens)
        if num_blocks > self.pool.num_blocks - (not request.after):
            raise InvalidRequestError(
                f"the prompt needs {num_blocks} KV blocks, the KV store has "
                f"{self.pool.num_blocks}: raise --kv-bytes or shorten the prompt",
                field="prompt",
            )
        if self.num_waiting >= self._max_waiting and not request.after:
            raise OverloadedError(
                f"{self._max_waiting} requests already wait for KV blocks", retry_after_s=1
            )

    def _go_on(self, handoff: Handoff, former: Handoff) -> None:
        """`former` ends, and what is final of it passes on."""
        self.abort(former.handoff_id, is_fenced=False, is_kept=True)
        handoff.go_on_from(former, self.pool, len(self.usable_keys(handoff)))
        self.abort(former.handoff_id, is_fenced=True)
        if handoff.state is HandoffState.SEALED:
            del self._preparing[handoff.handoff_id]

    # ---- filling and claiming -----------------------------------------------------------------

    def fill(self, handoff_id: str, epoch: int, member_id: str) -> Handoff:
        """Grant the reserved blocks to prefill, or to decode that computes its own prompt.

        In the second case the handoff is claimed at once and the blocks belong to decode's lease.
        """
        handoff = self.find(handoff_id, epoch)
        self.num_reserved -= handoff.fill(self.pool, member_id)
        return handoff

    def commit(
        self,
        handoff_id: str,
        epoch: int,
        member_id: str,
        *,
        first_index: int,
        blocks: list[int],
        keys: list[bytes],
    ) -> Handoff:
        """Blocks of the writer are final. Without `keys` those of the prompt hold.

        Decode may commit until it has quit, also after an abort: it counts what it has said is
        final as no longer in its lease.
        """
        handoff = self.handoffs.get(handoff_id)
        if (
            handoff is not None
            and handoff.state is HandoffState.ABORTING
            and (handoff.epoch, handoff.decode_id) == (epoch, member_id)
        ):
            handoff.commit_late(self.pool, member_id, first_index=first_index, blocks=blocks)
            return handoff
        handoff = self.find(handoff_id, epoch)
        handoff.commit(self.pool, member_id, first_index=first_index, blocks=blocks, keys=keys)
        return handoff

    def find(self, handoff_id: str, epoch: int) -> Handoff:
        """A living handoff. Raises StaleError if it is over or at another epoch."""
        handoff = self.handoffs.get(handoff_id)
        if handoff is not None and handoff.state in OVER:
            raise StaleError("this handoff is over")
        return self.find_any(handoff_id, epoch)

    def find_any(self, handoff_id: str, epoch: int) -> Handoff:
        """A handoff that has blocks still. Raises StaleError if there is none of this epoch."""
        handoff = self.handoffs.get(handoff_id)
        if handoff is None:
            raise StaleError("this handoff is over")
        if handoff.epoch != epoch:
            raise StaleError(f"this handoff is at epoch {handoff.epoch}, not {epoch}")
        return handoff

    def discard(self, handoff_id: str, epoch: int, member_id: str, indexes: list[int]) -> int:
        """A worker found that blocks it read are not what their digests say: they are found no
        more. Returns how many of them nobody had found out before."""
        blocks = self.find_any(handoff_id, epoch).readable(member_id, indexes)
        final = [block for block in blocks if self.pool[block].state is BlockState.COMMITTED]
        sound = [block for block in final if not self.pool[block].is_corrupt]
        for block in sound:
            self.pool.discard(block)
        return len(sound)

    def seal(self, handoff_id: str, epoch: int, member_id: str, *, finished: bool) -> Handoff:
        """Prefill writes no more. `finished`: there is nothing to decode, all is released."""
        handoff = self.find(handoff_id, epoch)
        if handoff.state is HandoffState.SEALED and member_id == handoff.prefill_id:
            return handoff
        handoff.expect(HandoffState.FILLING)
        handoff.expect_writer(member_id)
        if finished:
            self._close(handoff)
        else:
            handoff.state = HandoffState.SEALED
            handoff.num_computed = handoff.num_tokens
            handoff.writer = ""
        return handoff

    def claim(self, handoff_id: str, epoch: int, member_id: str) -> Handoff:
        """Decode takes over; the unfinished last block joins its lease."""
        handoff = self.find(handoff_id, epoch)
        handoff.claim(self.pool, member_id)
        return handoff

    def release(self, handoff_id: str, epoch: int, member_id: str) -> None:
        """Decode is done: committed blocks lose their reader, the rest stay in its lease."""
        handoff = self.find(handoff_id, epoch)
        handoff.expect(HandoffState.CLAIMED)
        handoff.expect_writer(member_id)
        self._close(handoff)

    def yield_(
        self, handoff_id: str, epoch: int, member_id: str, *, num_tokens: int, blocks: list[int]
    ) -> Handoff:
        """Decode writes no more; what it has computed is held for its gateway to go on from.

        Raises StaleError unless `num_tokens` is what the committed blocks and `blocks` hold.
        """
        handoff = self.find(handoff_id, epoch)
        handoff.expect(HandoffState.CLAIMED)
        num_full = num_tokens // self.block_size
        num_rest = self._blocks_for(num_tokens) - num_full
        if (num_full, num_rest) != (handoff.num_committed, len(blocks)):
            raise StaleError(
                f"{num_tokens} tokens are {num_full} committed blocks and {num_rest} more, not "
                f"{handoff.num_committed} and {len(blocks)}"
            )
        handoff.hand_back(self.pool, member_id, num_tokens=num_tokens, blocks=blocks)
        return handoff

    def suspend(self, handoff_id: str, epoch: int, member_id: str, num_tokens: int) -> Handoff:
        """Decode was preempted: drop the blocks, wait at the head of the line for room to go on.

        Raises TooLargeError if the store could never hold `num_tokens`, UnprocessableError if they
        are fewer than before.
        """
        handoff = self.find(handoff_id, epoch)
        handoff.expect(HandoffState.CLAIMED)
        handoff.expect_writer(member_id)
        if num_tokens < handoff.num_tokens:
            raise UnprocessableError(
                f"num_tokens must be at least {handoff.num_tokens}, got {num_tokens}",
                field="num_tokens",
            )
        if self._blocks_for(num_tokens) > self.pool.num_blocks:
            raise TooLargeError(
                f"the sequence has grown to {num_tokens} tokens, the KV store holds "
                f"{self.pool.num_blocks * self.block_size}: raise --kv-bytes"
            )
        self._drop_blocks(handoff)
        handoff.num_tokens = num_tokens
        handoff.epoch += 1
        handoff.state = HandoffState.WAITING
        self._waiting.appendleft(handoff)
        return handoff

    # ---- leases -------------------------------------------------------------------------------

    def lease(self, member_id: str, count: int) -> list[int]:
        """Up to `count` free blocks to grow into. Only reservations are out of reach."""
        return self.pool.grant(max(0, min(count, self.room)), member_id)

    def give_back(self, member_id: str, blocks: list[int]) -> None:
        """Leased blocks are free again. Those that are not the sender's are left alone."""
        pool = self.pool
        pool.free([each for each in dict.fromkeys(blocks) if pool.is_granted(each, member_id)])

    # ---- endings ------------------------------------------------------------------------------

    def abort(self, handoff_id: str, *, is_fenced: bool, is_kept: bool = False) -> Handoff | None:
        """End a handoff wherever it stands. Returns it, or None if it was ended before.

        If a writer may be at work the handoff is ABORTING until that writer says `quit` or is dead,
        and its granted blocks are quarantined. What it only reads is given back as soon as nothing
        that it makes of it counts: when the gateway takes no more of its tokens (`is_fenced`).
        `is_kept`: until then it is HELD, also when nobody writes any more.
        """
        handoff = self.handoffs.get(handoff_id)
        if handoff is None:
            return None
        was_over = handoff.state in OVER
        handoff.is_kept = is_kept and (handoff.is_kept or not was_over)
        if handoff.state in (HandoffState.FILLING, HandoffState.CLAIMED):
            if handoff.state is HandoffState.FILLING:
                self.pool.quarantine(handoff.blocks[handoff.num_committed :])
            handoff.state = HandoffState.ABORTING
        if is_fenced and handoff.state is HandoffState.ABORTING:
            self._fence(handoff)
        elif handoff.state is not HandoffState.ABORTING:
            self._end(handoff)
        return None if was_over else handoff

    def _fence(self, handoff: Handoff) -> None:
        handoff.is_fenced = True
        handoff.unpin(self.pool)

    def _end(self, handoff: Handoff) -> None:
        """Nobody writes for this handoff any more: hold what its gateway may go on from."""
        if not handoff.is_kept or not handoff.blocks or handoff.is_fenced:
            self._close(handoff)
            return
        self._leave_line(handoff)
        self.num_reserved -= handoff.num_reserved
        handoff.hold(self.pool)

    def quit(self, handoff_id: str, member_id: str) -> None:
        """The writer of an aborted handoff writes no more."""
        handoff = self.handoffs.get(handoff_id)
        if handoff is None or handoff.state is not HandoffState.ABORTING:
            return
        if handoff.writer == member_id:
            self._end(handoff)

    @property
    def is_written(self) -> bool:
        """Whether anybody may be writing who holds no living handoff."""
        return bool(self.pool.counts()["quarantined"]) or self.staging.is_busy

    def handoffs_of(self, member_id: str) -> list[Handoff]:
        """The handoffs that a member opened, fills or decodes."""
        return [handoff for handoff in self.handoffs.values() if handoff.needs(member_id)]

    def lose_writer(self, member_id: str) -> list[int]:
        """A member was not heard from: what it may still write into is quarantined. Returns it."""
        pool, written = self.pool, self.pool.written_by(member_id)
        lost = [each for each in written if pool.is_granted(each, member_id)]
        pool.quarantine(lost)
        return lost

    def waits_for(self, member_id: str) -> bool:
        """Whether anything is held back until this member stops."""
        return bool(self.pool.written_by(member_id)) or any(
            member_id in (handoff.writer, handoff.gateway_id) for handoff in self.handoffs.values()
        )

    def member_stopped(self, member_id: str) -> list[int]:
        """A member is dead, or says that it writes and listens no more: nothing of it needs
        quarantine. Returns the blocks of its own that are free by it."""
        for handoff in list(self.handoffs.values()):
            if handoff.state is HandoffState.ABORTING and handoff.writer == member_id:
                self._end(handoff)
            elif handoff.state is HandoffState.ABORTING and handoff.gateway_id == member_id:
                self._fence(handoff)
        written = self.pool.written_by(member_id)
        self.pool.free(written)
        return written

    # ---- within -------------------------------------------------------------------------------

    def _close(self, handoff: Handoff) -> None:
        self._leave_line(handoff)
        self._drop_blocks(handoff)
        del self.handoffs[handoff.handoff_id]

    def _drop_blocks(self, handoff: Handoff) -> None:
        self.num_reserved -= handoff.num_reserved
        handoff.drop_blocks(self.pool)

    def readers(self) -> Counter[int]:
        """How many readers each block has by those who read: handoffs and the disk."""
        readers = Counter(self.staging.pinned)
        for handoff in self.handoffs.values():
            readers.update(handoff.blocks[: handoff.num_committed])
        return readers

    def check(self) -> None:
        """Assert that handoffs and blocks account for one another."""
        self.pool.check()
        reserved = sum(handoff.num_reserved for handoff in self.handoffs.values())
        assert reserved == self.num_reserved <= self.pool.num_available
        readers = self.readers()
        for block_id in range(self.pool.num_blocks):
            assert self.pool[block_id].num_readers == readers[block_id]
