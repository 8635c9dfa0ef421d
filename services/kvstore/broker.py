"""Handoff messages in, ledger transitions, handoff messages out. Knows members, no sockets."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.messages import (
    Aborted,
    AbortHandoff,
    CacheDropped,
    Claim,
    Commit,
    Discard,
    DropCache,
    Fill,
    Filled,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Message,
    Ok,
    OpenHandoff,
    Quit,
    Release,
    Seal,
    Sealed,
    StaleError,
    Suspend,
    Yield,
)
from common.net.server import failed
from kvbaton.errors import ProtocolError, UnavailableError
from kvbaton.traceparent import trace_id
from services.kvstore.handoff import Handoff, HandoffState, OpenRequest
from services.kvstore.history import History
from services.kvstore.ledger import Ledger
from services.kvstore.notes import Notes

log = structlog.get_logger()


class Broker:
    """Carries out what members say of handoffs and tells the others what it means for them.

    `send(member_id, message)` queues a message for a member, if it is still there. `role_of(id)` is
    its role, None if it has gone. `must_pull(id)`: the member cannot map the arena, and wants to
    know early what it may pull. `load_first(handoff)`: whether it has to be prepared before it
    stands in line, which `prepared` ends. `forget_stored(key)`: nobody shall find the block of this
    key on a disk either; `forget_all_stored()`: nor that of any.
    """

    def __init__(
        self,
        ledger: Ledger,
        send: Callable[[str, Message], None],
        role_of: Callable[[str], str | None],
        must_pull: Callable[[str], bool],
        *,
        load_first: Callable[[Handoff], bool] = lambda _: False,
        forget_stored: Callable[[bytes], None] = lambda _: None,
        forget_all_stored: Callable[[], None] = lambda: None,
        history: History | None = None,
    ) -> None:
        self.ledger = ledger
        self.history = History() if history is None else history
        self.notes = Notes(self.history, ledger.pool)
        self._send = send
        self._role_of = role_of
        self._must_pull = must_pull
        self._load_first = load_first
        self._forget_stored = forget_stored
        self._forget_all_stored = forget_all_stored
        self.num_corrupt = 0  # blocks whose bytes did not fit their digest
        self._waiting_calls: dict[str, tuple[str, int]] = {}  # handoff id -> member id, call id

    def from_gateway(self, gateway_id: str, message: Message) -> Message | None:
        """A gateway's message. Raises KvbatonError to refuse it."""
        if isinstance(message, OpenHandoff):
            self._open(gateway_id, message)
            return None
        if isinstance(message, DropCache):
            return self._drop_cache(gateway_id)
        if isinstance(message, AbortHandoff):
            handoff = self.ledger.handoffs.get(
                message.handoff_id or self._opened_by(gateway_id, message.open_call_id)
            )
            if handoff is not None and handoff.gateway_id == gateway_id:
                self._abort(handoff, gateway_id, "its gateway ended it", is_fenced=True)
            return None
        raise ProtocolError(f"a gateway must not send {type(message).__name__}")

    def from_worker(self, worker_id: str, message: Message) -> Message | None:
        """A worker's message. Raises KvbatonError to refuse it."""
        handler = _WORKER_HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError(f"a worker must not send {type(message).__name__}")
        return handler(self, worker_id, message)

    def admit(self) -> None:
        """Answer those who wait for room and have it now. To be called when a message is done."""
        for handoff in self.ledger.admit():
            self.notes.handoff("handoff_admitted", handoff, handoff.gateway_id, handoff.blocks)
            call = self._waiting_calls.pop(handoff.handoff_id, None)
            if call is None:
                continue  # aborted while the others were told
            member_id, call_id = call
            self._send(member_id, _opened(handoff, call_id))

    def lose(self, member_id: str, reason: str) -> None:
        """A member is gone: its handoffs cannot go on, but their gateways may, from there."""
        for handoff in self.ledger.handoffs_of(member_id):
            is_kept = self._role_of(handoff.gateway_id) is not None
            self._abort(handoff, member_id, reason, is_kept=is_kept)

    def lose_writer(self, member_id: str) -> None:
        """A member was not heard from: what it may still write into is quarantined."""
        lost = self.ledger.lose_writer(member_id)
        self.notes.blocks("blocks_quarantined", lost, member_id)

    def member_stopped(self, member_id: str) -> None:
        """A member is dead, or says that it writes and listens no more."""
        for handoff in self.ledger.handoffs.values():
            if handoff.state is HandoffState.ABORTING and member_id == handoff.writer:
                self.notes.handoff("handoff_freed", handoff, member_id, handoff.blocks)
            elif handoff.state is HandoffState.ABORTING and member_id == handoff.gateway_id:
                final = handoff.blocks[: handoff.num_committed]
                self.notes.handoff("handoff_fenced", handoff, member_id, final)
        freed = self.ledger.member_stopped(member_id)
        self.notes.blocks("blocks_freed", freed, member_id)

    # ---- a gateway's ----------------------------------------------------------------------------

    def _open(self, gateway_id: str, message: OpenHandoff) -> None:
        wanted = {message.prefill_id: ["prefill"], message.decode_id: ["decode"]}
        if len(wanted) == 1:  # one that does both
            wanted[message.decode_id] = ["decode", "prefill"]
        for member_id, roles in wanted.items():
            found = self._role_of(member_id)
            if found is None:
                raise UnavailableError("a worker of this handoff has gone", retry_after_s=1)
            if found not in roles:
                raise ProtocolError(f"{member_id} is a {found}, not a {roles[0]} worker")
        request = OpenRequest(
            request_id=message.request_id,
            gateway_id=gateway_id,
            prefill_id=message.prefill_id,
            decode_id=message.decode_id,
            tenant=message.tenant,
            root_key=message.root_key,
            keys=message.keys,
            num_tokens=message.num_tokens,
            after=message.after,
            trace_id=trace_id(message.traceparent),
        )
        self.ledger.check_open(request)
        self._end_former(gateway_id, message.after)
        handoff = self.ledger.open(request)
        self.notes.handoff("handoff_opened", handoff, gateway_id, handoff.blocks)
        if handoff.state is HandoffState.SEALED:
            self._send(gateway_id, _opened(handoff, message.call_id))
            return
        self._waiting_calls[handoff.handoff_id] = (gateway_id, message.call_id)
        if handoff.epoch > 1 or not self._load_first(handoff):
            self.ledger.line_up(handoff.handoff_id)

    def _end_former(self, gateway_id: str, handoff_id: str) -> None:
        """The gateway goes on from this handoff elsewhere: its workers hear of it first."""
        former = self.ledger.handoffs.get(handoff_id)
        if former is not None and former.gateway_id == gateway_id:
            self._abort(former, gateway_id, "its gateway goes on elsewhere", is_kept=True)

    def prepared(self, handoff_id: str) -> None:
        """A handoff has what it waited for, if it is not over; others may have room by it."""
        self.ledger.line_up(handoff_id)
        self.admit()

    def _drop_cache(self, gateway_id: str) -> CacheDropped:
        """What is loaded from the disk just now is found all the same."""
        blocks = self.ledger.pool.hide_all()
        self._forget_all_stored()
        self.notes.blocks("blocks_dropped", blocks, gateway_id)
        log.info("cache_dropped", gateway=gateway_id, num_blocks=len(blocks))
        return CacheDropped(num_blocks=len(blocks))

    def _opened_by(self, gateway_id: str, call_id: int) -> str:
        """The handoff that waits for room because of this call; "" if none does."""
        waiting = self._waiting_calls.items()
        return next(
            (handoff_id for handoff_id, call in waiting if call == (gateway_id, call_id)), ""
        )

    def _abort(
        self,
        handoff: Handoff,
        by: str,
        reason: str,
        *,
        is_fenced: bool = False,
        is_kept: bool = False,
    ) -> None:
        """`is_kept`: what is final of it is held, its gateway may go on from there."""
        before, was_fenced = handoff.state, handoff.is_fenced
        final = handoff.blocks[: handoff.num_committed]
        rest = handoff.blocks[handoff.num_committed :]
        aborted = self.ledger.abort(handoff.handoff_id, is_fenced=is_fenced, is_kept=is_kept)
        if aborted is not None:
            detail = f"while {before.value}: {reason}"
            self.notes.handoff("handoff_aborted", handoff, by, [*final, *rest], detail)
            if before is HandoffState.FILLING:
                self.notes.blocks("blocks_quarantined", rest, handoff.writer, handoff)
        if handoff.is_fenced and not was_fenced:
            self.notes.handoff("handoff_fenced", handoff, by, final)
        if aborted is None:
            return
        waiting = self._waiting_calls.pop(handoff.handoff_id, None)
        if waiting is not None:
            member_id, call_id = waiting
            self._send(member_id, failed(StaleError(reason), call_id))
        self._tell_aborted(handoff, reason, handoff.prefill_id, handoff.decode_id)
        if by != handoff.gateway_id:
            self._tell_aborted(handoff, reason, handoff.gateway_id)

    def _tell_aborted(self, handoff: Handoff, reason: str, *member_ids: str) -> None:
        for member_id in dict.fromkeys(member_ids):
            aborted = Aborted(handoff_id=handoff.handoff_id, epoch=handoff.epoch, reason=reason)
            self._send(member_id, aborted)

    # ---- a worker's -----------------------------------------------------------------------------

    def _fill(self, worker_id: str, message: Fill) -> Granted:
        reserved = self.ledger.handoffs.get(message.handoff_id)
        num_granted = 0 if reserved is None else reserved.num_reserved
        num_evicted = self.ledger.pool.num_evicted
        handoff = self.ledger.fill(message.handoff_id, message.epoch, worker_id)
        if num_granted:
            granted = handoff.blocks[-num_granted:]
            num_evicted = self.ledger.pool.num_evicted - num_evicted
            self.notes.granted("handoff_filled", granted, num_evicted, worker_id, handoff)
        if handoff.state is HandoffState.FILLING:
            self._offer(handoff, 0, handoff.num_committed)
        return self._granted(handoff, worker_id)

    def _commit(self, worker_id: str, message: Commit) -> None:
        before = self.ledger.handoffs.get(message.handoff_id)
        num_before = 0 if before is None else before.num_committed
        handoff = self.ledger.commit(
            message.handoff_id,
            message.epoch,
            worker_id,
            first_index=message.first_index,
            blocks=message.blocks,
            keys=message.keys,
        )
        if handoff.num_committed > num_before or handoff.is_fenced:
            self.notes.blocks("blocks_committed", message.blocks, worker_id, handoff)
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
        return [self.ledger.pool[block].stamp for block in blocks]

    def _granted(self, handoff: Handoff, worker_id: str) -> Granted:
        return Granted(
            blocks=handoff.blocks,
            num_committed=handoff.num_committed,
            num_keys=len(handoff.keys),
            stamps=self._stamps(worker_id, handoff.blocks),
        )

    def _is_late(self, worker_id: str, message: Seal | Release) -> bool:
        """The writer of an aborted handoff says how it ended, not having heard yet: it writes no
        more, as if it had quit."""
        handoff = self.ledger.handoffs.get(message.handoff_id)
        if handoff is None or handoff.state is not HandoffState.ABORTING:
            return False
        is_due = isinstance(message, Release if worker_id == handoff.decode_id else Seal)
        if not is_due or (handoff.epoch, handoff.writer) != (message.epoch, worker_id):
            return False
        self._writer_quits(handoff, worker_id)
        return True

    def _writer_quits(self, handoff: Handoff, worker_id: str) -> None:
        self.notes.handoff("handoff_quit", handoff, worker_id, handoff.blocks)
        self.ledger.quit(handoff.handoff_id, worker_id)

    def _seal(self, worker_id: str, message: Seal) -> None:
        if self._is_late(worker_id, message):
            return
        before = self.ledger.handoffs.get(message.handoff_id)
        is_first = before is not None and before.state is HandoffState.FILLING
        blocks = list(before.blocks) if before is not None else []
        handoff = self.ledger.seal(
            message.handoff_id, message.epoch, worker_id, finished=message.finished
        )
        if is_first:
            detail = "finished: nothing to decode" if message.finished else ""
            self.notes.handoff("handoff_sealed", handoff, worker_id, blocks, detail)
        if message.finished:
            self._tell_aborted(handoff, "finished", handoff.decode_id)
            return
        sealed = Sealed(
            handoff_id=handoff.handoff_id, epoch=handoff.epoch, first_token=message.first_token
        )
        self._send(handoff.decode_id, sealed)

    def _claim(self, worker_id: str, message: Claim) -> Granted:
        before = self.ledger.handoffs.get(message.handoff_id)
        is_first = before is not None and before.state is HandoffState.SEALED
        handoff = self.ledger.claim(message.handoff_id, message.epoch, worker_id)
        if is_first:
            self.notes.handoff("handoff_claimed", handoff, worker_id, handoff.blocks)
        return self._granted(handoff, worker_id)

    def _release(self, worker_id: str, message: Release) -> None:
        if self._is_late(worker_id, message):
            return
        handoff = self.ledger.find(message.handoff_id, message.epoch)
        blocks = list(handoff.blocks)
        self.ledger.release(message.handoff_id, message.epoch, worker_id)
        self.notes.handoff("handoff_released", handoff, worker_id, blocks)

    def _suspend(self, worker_id: str, message: Suspend) -> None:
        blocks = list(self.ledger.find(message.handoff_id, message.epoch).blocks)
        handoff = self.ledger.suspend(
            message.handoff_id, message.epoch, worker_id, message.num_tokens
        )
        self.notes.handoff("handoff_suspended", handoff, worker_id, blocks)
        self._waiting_calls[handoff.handoff_id] = (worker_id, message.call_id)

    def _yield(self, worker_id: str, message: Yield) -> Ok:
        handoff = self.ledger.yield_(
            message.handoff_id,
            message.epoch,
            worker_id,
            num_tokens=message.num_tokens,
            blocks=message.blocks,
        )
        self.notes.handoff("handoff_yielded", handoff, worker_id, handoff.blocks)
        return Ok()

    def _quit(self, worker_id: str, message: Quit) -> None:
        """A worker gives up, or confirms an abort."""
        handoff = self.ledger.handoffs.get(message.handoff_id)
        if handoff is None or handoff.epoch != message.epoch:
            return
        if handoff.needs(worker_id):
            self._abort(handoff, worker_id, "a worker gave it up", is_kept=True)
        if handoff.state is HandoffState.ABORTING and handoff.writer == worker_id:
            self._writer_quits(handoff, worker_id)

    def _lease(self, worker_id: str, message: Lease) -> Leased:
        num_evicted = self.ledger.pool.num_evicted
        blocks = self.ledger.lease(worker_id, message.num_blocks)
        num_evicted = self.ledger.pool.num_evicted - num_evicted
        self.notes.granted("blocks_leased", blocks, num_evicted, worker_id)
        return Leased(blocks=blocks, stamps=self._stamps(worker_id, blocks))

    def _give_back(self, worker_id: str, message: GiveBack) -> None:
        pool = self.ledger.pool
        given = [each for each in message.blocks if pool.is_granted(each, worker_id)]
        self.ledger.give_back(worker_id, message.blocks)
        self.notes.blocks("blocks_given_back", given, worker_id)

    def _discard(self, worker_id: str, message: Discard) -> None:
        """Bytes did not fit their digest: others shall compute them anew."""
        handoff = self.ledger.find_any(message.handoff_id, message.epoch)
        num = self.ledger.discard(message.handoff_id, message.epoch, worker_id, message.indexes)
        blocks = handoff.readable(worker_id, message.indexes)
        self.notes.blocks("blocks_discarded", blocks, worker_id, handoff)
        log.error("blocks_corrupt", handoff=message.handoff_id, worker=worker_id, num_dropped=num)
        self.num_corrupt += num
        for index in message.indexes:
            self._forget_stored(handoff.key_of(index))


def _opened(handoff: Handoff, call_id: int) -> HandoffOpened:
    return HandoffOpened(
        call_id=call_id,
        handoff_id=handoff.handoff_id,
        epoch=handoff.epoch,
        num_cached_blocks=handoff.num_cached,
        is_whole=handoff.state is HandoffState.SEALED,
        num_loaded_blocks=min(handoff.num_loaded, handoff.num_cached),
    )


_WORKER_HANDLERS: dict[type[Message], Callable[..., Message | None]] = {
    Fill: Broker._fill,
    Commit: Broker._commit,
    Seal: Broker._seal,
    Claim: Broker._claim,
    Release: Broker._release,
    Suspend: Broker._suspend,
    Yield: Broker._yield,
    Quit: Broker._quit,
    Lease: Broker._lease,
    GiveBack: Broker._give_back,
    Discard: Broker._discard,
}
