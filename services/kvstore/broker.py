"""Handoff messages in, ledger transitions, handoff messages out. Knows members, no sockets."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from common.messages import (
    Aborted,
    AbortHandoff,
    Claim,
    Commit,
    Fill,
    Filled,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Message,
    OpenHandoff,
    Quit,
    Release,
    Seal,
    Sealed,
    StaleError,
    Suspend,
)
from common.net.server import failed
from kvbaton.errors import ProtocolError, UnavailableError
from services.kvstore.handoff import Handoff, HandoffState, OpenRequest
from services.kvstore.ledger import Ledger

log = structlog.get_logger()


class Broker:
    """Carries out what members say of handoffs and tells the others what it means for them.

    `send(member_id, message)` queues a message for a member, if it is still there. `role_of(id)` is
    its role, None if it has gone. `must_pull(id)`: the member cannot map the arena, and wants to
    know early what it may pull.
    """

    def __init__(
        self,
        ledger: Ledger,
        send: Callable[[str, Message], None],
        role_of: Callable[[str], str | None],
        must_pull: Callable[[str], bool],
    ) -> None:
        self.ledger = ledger
        self._send = send
        self._role_of = role_of
        self._must_pull = must_pull
        self._waiting_calls: dict[str, tuple[str, int]] = {}  # handoff id -> member id, call id

    def from_gateway(self, gateway_id: str, message: Message) -> Message | None:
        """A gateway's message. Raises KvbatonError to refuse it."""
        if isinstance(message, OpenHandoff):
            self._open(gateway_id, message)
            return None
        if isinstance(message, AbortHandoff):
            handoff = self.ledger.handoffs.get(
                message.handoff_id or self._opened_by(gateway_id, message.open_call_id)
            )
            if handoff is not None and handoff.gateway_id == gateway_id:
                self._abort(handoff, "its gateway ended it")
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
            log.debug("handoff_reserved", handoff=handoff.handoff_id, cached=handoff.num_cached)
            call = self._waiting_calls.pop(handoff.handoff_id, None)
            if call is None:
                continue  # aborted while the others were told
            member_id, call_id = call
            opened = HandoffOpened(
                call_id=call_id,
                handoff_id=handoff.handoff_id,
                epoch=handoff.epoch,
                num_cached_blocks=handoff.num_cached,
            )
            self._send(member_id, opened)

    def lose(self, member_id: str, reason: str) -> None:
        """A member is gone: nobody can go on with its handoffs."""
        for handoff in self.ledger.handoffs_of(member_id):
            self._abort(handoff, reason)

    # ---- a gateway's ----------------------------------------------------------------------------

    def _open(self, gateway_id: str, message: OpenHandoff) -> None:
        colocated = message.prefill_id == message.decode_id
        wanted = {message.prefill_id: "prefill"} if not colocated else {}
        for member_id, role in (wanted | {message.decode_id: "decode"}).items():
            found = self._role_of(member_id)
            if found is None:
                raise UnavailableError("a worker of this handoff has gone", retry_after_s=1)
            if found != role:
                raise ProtocolError(f"{member_id} is a {found}, not a {role} worker")
        handoff = self.ledger.open(
            OpenRequest(
                gateway_id=gateway_id,
                prefill_id=message.prefill_id,
                decode_id=message.decode_id,
                root_key=message.root_key,
                keys=message.keys,
                num_tokens=message.num_tokens,
            )
        )
        log.debug("handoff_opened", handoff=handoff.handoff_id, request=message.request_id)
        self._waiting_calls[handoff.handoff_id] = (gateway_id, message.call_id)

    def _opened_by(self, gateway_id: str, call_id: int) -> str:
        """The handoff that waits for room because of this call; "" if none does."""
        waiting = self._waiting_calls.items()
        return next(
            (handoff_id for handoff_id, call in waiting if call == (gateway_id, call_id)), ""
        )

    def _abort(self, handoff: Handoff, reason: str) -> None:
        before = handoff.state
        if self.ledger.abort(handoff.handoff_id) is None:
            return
        log.debug("handoff_aborted", handoff=handoff.handoff_id, state=before.value, reason=reason)
        waiting = self._waiting_calls.pop(handoff.handoff_id, None)
        if waiting is not None:
            member_id, call_id = waiting
            self._send(member_id, failed(StaleError(reason), call_id))
        self._tell_aborted(handoff, reason, handoff.prefill_id, handoff.decode_id)
        self._tell_aborted(handoff, reason, handoff.gateway_id)

    def _tell_aborted(self, handoff: Handoff, reason: str, *member_ids: str) -> None:
        for member_id in dict.fromkeys(member_ids):
            aborted = Aborted(handoff_id=handoff.handoff_id, epoch=handoff.epoch, reason=reason)
            self._send(member_id, aborted)

    # ---- a worker's -----------------------------------------------------------------------------

    def _fill(self, worker_id: str, message: Fill) -> Granted:
        handoff = self.ledger.fill(message.handoff_id, message.epoch, worker_id)
        if handoff.state is HandoffState.FILLING:
            self._offer(handoff, handoff.blocks[: handoff.num_committed])
        return _granted(handoff)

    def _commit(self, worker_id: str, message: Commit) -> None:
        handoff = self.ledger.commit(
            message.handoff_id,
            message.epoch,
            worker_id,
            first_index=message.first_index,
            blocks=message.blocks,
            keys=message.keys,
        )
        if handoff.state is HandoffState.FILLING:
            self._offer(handoff, message.blocks)

    def _offer(self, handoff: Handoff, blocks: list[int]) -> None:
        if blocks and self._must_pull(handoff.decode_id):
            filled = Filled(handoff_id=handoff.handoff_id, epoch=handoff.epoch, blocks=blocks)
            self._send(handoff.decode_id, filled)

    def _seal(self, worker_id: str, message: Seal) -> None:
        handoff = self.ledger.seal(
            message.handoff_id, message.epoch, worker_id, finished=message.finished
        )
        log.debug("handoff_sealed", handoff=handoff.handoff_id, finished=message.finished)
        if message.finished:
            self._tell_aborted(handoff, "finished", handoff.decode_id)
            return
        sealed = Sealed(
            handoff_id=handoff.handoff_id, epoch=handoff.epoch, first_token=message.first_token
        )
        self._send(handoff.decode_id, sealed)

    def _claim(self, worker_id: str, message: Claim) -> Granted:
        handoff = self.ledger.claim(message.handoff_id, message.epoch, worker_id)
        log.debug("handoff_claimed", handoff=handoff.handoff_id)
        return _granted(handoff)

    def _release(self, worker_id: str, message: Release) -> None:
        self.ledger.release(message.handoff_id, message.epoch, worker_id)
        log.debug("handoff_released", handoff=message.handoff_id)

    def _suspend(self, worker_id: str, message: Suspend) -> None:
        handoff = self.ledger.suspend(
            message.handoff_id, message.epoch, worker_id, message.num_tokens
        )
        log.info("handoff_suspended", handoff=handoff.handoff_id, num_tokens=message.num_tokens)
        self._waiting_calls[handoff.handoff_id] = (worker_id, message.call_id)

    def _quit(self, worker_id: str, message: Quit) -> None:
        """A worker gives up, or confirms an abort."""
        handoff = self.ledger.handoffs.get(message.handoff_id)
        if handoff is None or handoff.epoch != message.epoch:
            return
        if handoff.needs(worker_id):
            self._abort(handoff, "a worker gave it up")
        self.ledger.quit(message.handoff_id, worker_id)

    def _lease(self, worker_id: str, message: Lease) -> Leased:
        return Leased(blocks=self.ledger.lease(worker_id, message.num_blocks))

    def _give_back(self, worker_id: str, message: GiveBack) -> None:
        self.ledger.give_back(worker_id, message.blocks)


def _granted(handoff: Handoff) -> Granted:
    return Granted(
        blocks=handoff.blocks,
        num_committed=handoff.num_committed,
        num_keys=len(handoff.keys),
        last_key=handoff.last_key,
    )


_WORKER_HANDLERS: dict[type[Message], Callable[..., Message | None]] = {
    Fill: Broker._fill,
    Commit: Broker._commit,
    Seal: Broker._seal,
    Claim: Broker._claim,
    Release: Broker._release,
    Suspend: Broker._suspend,
    Quit: Broker._quit,
    Lease: Broker._lease,
    GiveBack: Broker._give_back,
}
