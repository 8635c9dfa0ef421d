"""Handoff messages in, ledger transitions, handoff messages out. Knows members, no sockets.

What gateways say is here, what workers say in from_workers.py, and in aborting.py how handoffs are
given up.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.messages import (
    AbortHandoff,
    CacheDropped,
    DropCache,
    HandoffOpened,
    Message,
    OpenHandoff,
)
from kvbaton.errors import ProtocolError, UnavailableError
from kvbaton.traceparent import trace_id
from services.kvstore.aborting import Aborting
from services.kvstore.from_workers import FromWorkers
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
        self.aborting = Aborting(ledger, self.notes, send)
        self._workers = FromWorkers(
            ledger,
            self.notes,
            self.aborting,
            send=send,
            must_pull=must_pull,
            forget_stored=forget_stored,
        )
        self._send = send
        self._role_of = role_of
        self._load_first = load_first
        self._forget_all_stored = forget_all_stored

    @property
    def num_corrupt(self) -> int:
        """Blocks whose bytes did not fit their digest where they came."""
        return self._workers.num_corrupt

    def from_gateway(self, gateway_id: str, message: Message) -> Message | None:
        """A gateway's message. Raises KvbatonError to refuse it."""
        if isinstance(message, OpenHandoff):
            self._open(gateway_id, message)
            return None
        if isinstance(message, DropCache):
            return self._drop_cache(gateway_id)
        if isinstance(message, AbortHandoff):
            handoff = self.ledger.handoffs.get(
                message.handoff_id or self.aborting.opened_by(gateway_id, message.open_call_id)
            )
            if handoff is not None and handoff.gateway_id == gateway_id:
                self.aborting.abort(handoff, gateway_id, "its gateway ended it", is_fenced=True)
            return None
        raise ProtocolError(f"a gateway must not send {type(message).__name__}")

    def from_worker(self, worker_id: str, message: Message) -> Message | None:
        """A worker's message. Raises KvbatonError to refuse it."""
        return self._workers.handle(worker_id, message)

    def admit(self) -> None:
        """Answer those who wait for room and have it now. To be called when a message is done."""
        for handoff in self.ledger.admit():
            self.notes.handoff("handoff_admitted", handoff, handoff.gateway_id, handoff.blocks)
            call = self.aborting.waiting_calls.pop(handoff.handoff_id, None)
            if call is None:
                continue  # aborted while the others were told
            member_id, call_id = call
            self._send(member_id, _opened(handoff, call_id))

    def lose(self, member_id: str, reason: str) -> None:
        """A member is gone: its handoffs cannot go on, but their gateways may, from there."""
        for handoff in self.ledger.handoffs_of(member_id):
            is_kept = self._role_of(handoff.gateway_id) is not None
            self.aborting.abort(handoff, member_id, reason, is_kept=is_kept)

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
        self.aborting.waiting_calls[handoff.handoff_id] = (gateway_id, message.call_id)
        if handoff.epoch > 1 or not self._load_first(handoff):
            self.ledger.line_up(handoff.handoff_id)

    def _end_former(self, gateway_id: str, handoff_id: str) -> None:
        """The gateway goes on from this handoff elsewhere: its workers hear of it first."""
        former = self.ledger.handoffs.get(handoff_id)
        if former is not None and former.gateway_id == gateway_id:
            self.aborting.abort(former, gateway_id, "its gateway goes on elsewhere", is_kept=True)

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


def _opened(handoff: Handoff, call_id: int) -> HandoffOpened:
    return HandoffOpened(
        call_id=call_id,
        handoff_id=handoff.handoff_id,
        epoch=handoff.epoch,
        num_cached_blocks=handoff.num_cached,
        is_whole=handoff.state is HandoffState.SEALED,
        num_loaded_blocks=min(handoff.num_loaded, handoff.num_cached),
    )
