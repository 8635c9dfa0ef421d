"""How handoffs are given up, and who is told. Knows members, no sockets."""

from __future__ import annotations

from collections.abc import Callable

from common.messages import Aborted, Message, Release, Seal, StaleError
from common.net.server import failed
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from services.kvstore.notes import Notes


class Aborting:
    """Of one ledger's handoffs. `waiting_calls`, by handoff id: who waits for room, and for the
    answer to which call. `send(member_id, message)` queues a message for a member, if it is still
    there."""

    def __init__(self, ledger: Ledger, notes: Notes, send: Callable[[str, Message], None]) -> None:
        self.waiting_calls: dict[str, tuple[str, int]] = {}
        self._ledger = ledger
        self._notes = notes
        self._send = send

    def abort(
        self,
        handoff: Handoff,
        by: str,
        reason: str,
        *,
        is_fenced: bool = False,
        is_kept: bool = False,
    ) -> None:
        """`by` is the member that ends it. `is_fenced`: it is the gateway, which takes no more of
        its output. `is_kept`: what is final of it is held, its gateway may go on from there."""
        before, was_fenced = handoff.state, handoff.is_fenced
        final = handoff.blocks[: handoff.num_committed]
        rest = handoff.blocks[handoff.num_committed :]
        aborted = self._ledger.abort(handoff.handoff_id, is_fenced=is_fenced, is_kept=is_kept)
        if aborted is not None:
            detail = f"while {before.value}: {reason}"
            self._notes.handoff("handoff_aborted", handoff, by, [*final, *rest], detail)
            if before is HandoffState.FILLING:
                self._notes.blocks("blocks_quarantined", rest, handoff.writer, handoff)
        if handoff.is_fenced and not was_fenced:
            self._notes.handoff("handoff_fenced", handoff, by, final)
        if aborted is None:
            return
        waiting = self.waiting_calls.pop(handoff.handoff_id, None)
        if waiting is not None:
            member_id, call_id = waiting
            self._send(member_id, failed(StaleError(reason), call_id))
        self.tell(handoff, reason, handoff.prefill_id, handoff.decode_id)
        if by != handoff.gateway_id:
            self.tell(handoff, reason, handoff.gateway_id)

    def tell(self, handoff: Handoff, reason: str, *member_ids: str) -> None:
        """These members hear that the handoff is over."""
        for member_id in dict.fromkeys(member_ids):
            aborted = Aborted(handoff_id=handoff.handoff_id, epoch=handoff.epoch, reason=reason)
            self._send(member_id, aborted)

    def opened_by(self, gateway_id: str, call_id: int) -> str:
        """The handoff that waits for room because of this call; "" if none does."""
        waiting = self.waiting_calls.items()
        return next(
            (handoff_id for handoff_id, call in waiting if call == (gateway_id, call_id)), ""
        )

    def is_late(self, worker_id: str, message: Seal | Release) -> bool:
        """The writer of an aborted handoff says how it ended, not having heard yet: it writes no
        more, as if it had quit."""
        handoff = self._ledger.handoffs.get(message.handoff_id)
        if handoff is None or handoff.state is not HandoffState.ABORTING:
            return False
        is_due = isinstance(message, Release if worker_id == handoff.decode_id else Seal)
        if not is_due or (handoff.epoch, handoff.writer) != (message.epoch, worker_id):
            return False
        self.writer_quits(handoff, worker_id)
        return True

    def writer_quits(self, handoff: Handoff, worker_id: str) -> None:
        """Who may have been writing into an aborted handoff's blocks writes no more."""
        self._notes.handoff("handoff_quit", handoff, worker_id, handoff.blocks)
        self._ledger.quit(handoff.handoff_id, worker_id)
