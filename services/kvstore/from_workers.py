"""What workers say of handoffs: they fill, seal, claim and end them, and what it means for others.

Knows members, no sockets.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.messages import (
    Claim,
    Commit,
    Discard,
    Fill,
    Filled,
    GiveBack,
    Granted,
    Lease,
    Leased,
    Message,
    Ok,
    Quit,
    Release,
    Seal,
    Sealed,
    Suspend,
    Yield,
)
from kvbaton.errors import ProtocolError
from services.kvstore.aborting import Aborting
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from services.kvstore.notes import Notes

log = structlog.get_logger()


class FromWorkers:
    """Carries out workers' messages. The functions are the broker's."""

    def __init__(
        self,
        ledger: Ledger,
        notes: Notes,
        aborting: Aborting,
        *,
        send: Callable[[str, Message], None],
        must_pull: Callable[[str], bool],
        forget_stored: Callable[[bytes], None],
    ) -> None:
        self.num_corrupt = 0  # blocks whose bytes did not fit their digest
        self._ledger = ledger
        self._notes = notes
        self._aborting = aborting
        self._send = send
        self._must_pull = must_pull
        self._forget_stored = forget_stored

    def handle(self, worker_id: str, message: Message) -> Message | None:
        """One message. Raises KvbatonError to refuse it."""
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError(f"a worker must not send {type(message).__name__}")
        return handler(self, worker_id, message)

    def _fill(self, worker_id: str, message: Fill) -> Granted:
        reserved = self._ledger.handoffs.get(message.handoff_id)
        num_granted = 0 if reserved is None else reserved.num_reserved
        num_evicted = self._ledger.pool.num_evicted
        handoff = self._ledger.fill(message.handoff_id, message.epoch, worker_id)
        if num_granted:
            granted = handoff.blocks[-num_granted:]
            num_evicted = self._ledger.pool.num_evicted - num_evicted
            self._notes.granted("handoff_filled", granted, num_evicted, worker_id, handoff)
        if handoff.state is HandoffState.FILLING:
            self._offer(handoff, 0, handoff.num_committed)
        return self._granted(handoff, worker_id)

    def _commit(self, worker_id: str, message: Commit) -> None:
        before = self._ledger.handoffs.get(message.handoff_id)
        num_before = 0 if before is None else before.num_committed
        handoff = self._ledger.commit(
            message.handoff_id,
            message.epoch,
            worker_id,
            first_index=message.first_index,
            blocks=message.blocks,
            keys=message.keys,
        )
        if handoff.num_committed > num_before or handoff.is_fenced:
            self._notes.blocks("blocks_committed", message.blocks, worker_id, handoff)
        if handoff.state is HandoffState.FILLING:
            self._offer(handoff, message.first_index, message.first_index + len(message.blocks))

    def _offer(self, handoff: Handoff, first: int, end: int) -> None:
        if first < end and self._must_pull(handoff.decode_id):
            blocks = handoff.blocks[first:end]
            filled = Filled(
                handoff_id=handoff.handoff_id,
                epoch=handoff.epoch,
                first_index=first,
                blocks=blocks,
                stamps=self._stamps(handoff.decode_id, blocks),
            )
            self._send(handoff.decode_id, filled)

    def _stamps(self, worker_id: str, blocks: list[int]) -> list[int]:
        """For who moves bytes: others see the blocks themselves."""
        if not self._must_pull(worker_id):
            return []
        return [self._ledger.pool[block].stamp for block in blocks]

    def _granted(self, handoff: Handoff, worker_id: str) -> Granted:
        return Granted(
            blocks=handoff.blocks,
            num_committed=handoff.num_committed,
            num_keys=len(handoff.keys),
            stamps=self._stamps(worker_id, handoff.blocks),
        )

    def _seal(self, worker_id: str, message: Seal) -> None:
        if self._aborting.is_late(worker_id, message):
            return
        before = self._ledger.handoffs.get(message.handoff_id)
        is_first = before is not None and before.state is HandoffState.FILLING
        blocks = list(before.blocks) if before is not None else []
        handoff = self._ledger.seal(
            message.handoff_id, message.epoch, worker_id, finished=message.finished
        )
        if is_first:
            detail = "finished: nothing to decode" if message.finished else ""
            self._notes.handoff("handoff_sealed", handoff, worker_id, blocks, detail)
        if message.finished:
            self._aborting.tell(handoff, "finished", handoff.decode_id)
            return
        sealed = Sealed(
            handoff_id=handoff.handoff_id, epoch=handoff.epoch, first_token=message.first_token
        )
        self._send(handoff.decode_id, sealed)

    def _claim(self, worker_id: str, message: Claim) -> Granted:
        before = self._ledger.handoffs.get(message.handoff_id)
        is_first = before is not None and before.state is HandoffState.SEALED
        handoff = self._ledger.claim(message.handoff_id, message.epoch, worker_id)
        if is_first:
            self._notes.handoff("handoff_claimed", handoff, worker_id, handoff.blocks)
        return self._granted(handoff, worker_id)

    def _release(self, worker_id: str, message: Release) -> None:
        if self._aborting.is_late(worker_id, message):
            return
        handoff = self._ledger.find(message.handoff_id, message.epoch)
        blocks = list(handoff.blocks)
        self._ledger.release(message.handoff_id, message.epoch, worker_id)
        self._notes.handoff("handoff_released", handoff, worker_id, blocks)

    def _suspend(self, worker_id: str, message: Suspend) -> None:
        blocks = list(self._ledger.find(message.handoff_id, message.epoch).blocks)
        handoff = self._ledger.suspend(
            message.handoff_id, message.epoch, worker_id, message.num_tokens
        )
        self._notes.handoff("handoff_suspended", handoff, worker_id, blocks)
        self._aborting.waiting_calls[handoff.handoff_id] = (worker_id, message.call_id)

    def _yield(self, worker_id: str, message: Yield) -> Ok:
        handoff = self._ledger.yield_(
            message.handoff_id,
            message.epoch,
            worker_id,
            num_tokens=message.num_tokens,
            blocks=message.blocks,
        )
        self._notes.handoff("handoff_yielded", handoff, worker_id, handoff.blocks)
        return Ok()

    def _quit(self, worker_id: str, message: Quit) -> None:
        """A worker gives up, or confirms an abort."""
        handoff = self._ledger.handoffs.get(message.handoff_id)
        if handoff is None or handoff.epoch != message.epoch:
            return
        if handoff.needs(worker_id):
            self._aborting.abort(handoff, worker_id, "a worker gave it up", is_kept=True)
        if handoff.state is HandoffState.ABORTING and handoff.writer == worker_id:
            self._aborting.writer_quits(handoff, worker_id)

    def _lease(self, worker_id: str, message: Lease) -> Leased:
        num_evicted = self._ledger.pool.num_evicted
        blocks = self._ledger.lease(worker_id, message.num_blocks)
        num_evicted = self._ledger.pool.num_evicted - num_evicted
        self._notes.granted("blocks_leased", blocks, num_evicted, worker_id)
        return Leased(blocks=blocks, stamps=self._stamps(worker_id, blocks))

    def _give_back(self, worker_id: str, message: GiveBack) -> None:
        pool = self._ledger.pool
        given = [each for each in message.blocks if pool.is_granted(each, worker_id)]
        self._ledger.give_back(worker_id, message.blocks)
        self._notes.blocks("blocks_given_back", given, worker_id)

    def _discard(self, worker_id: str, message: Discard) -> None:
        """Bytes did not fit their digest: others shall compute them anew."""
        handoff = self._ledger.find_any(message.handoff_id, message.epoch)
        num = self._ledger.discard(message.handoff_id, message.epoch, worker_id, message.indexes)
        blocks = handoff.readable(worker_id, message.indexes)
        self._notes.blocks("blocks_discarded", blocks, worker_id, handoff)
        log.error("blocks_corrupt", handoff=message.handoff_id, worker=worker_id, num_dropped=num)
        self.num_corrupt += num
        for index in message.indexes:
            self._forget_stored(handoff.key_of(index))


_HANDLERS: dict[type[Message], Callable[..., Message | None]] = {
    Fill: FromWorkers._fill,
    Commit: FromWorkers._commit,
    Seal: FromWorkers._seal,
    Claim: FromWorkers._claim,
    Release: FromWorkers._release,
    Suspend: FromWorkers._suspend,
    Yield: FromWorkers._yield,
    Quit: FromWorkers._quit,
    Lease: FromWorkers._lease,
    GiveBack: FromWorkers._give_back,
    Discard: FromWorkers._discard,
}
