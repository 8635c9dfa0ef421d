"""What a worker holds of a store, as it sees it itself."""

from __future__ import annotations

from common.messages import HeldSequence, Holdings
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink


def holdings(store: StoreLink, sequences: list[Sequence], audit_id: int) -> Holdings:
    """Everything that the store gave to this incarnation of us and has not got back."""
    return Holdings(
        audit_id=audit_id,
        sequences=[
            HeldSequence(
                handoff_id=sequence.handoff_id,
                epoch=sequence.epoch,
                blocks=list(sequence.blocks),
                num_committed=sequence.num_committed,
            )
            for sequence in sequences
            if sequence.store == store.index and sequence.incarnation == store.member_id
        ],
        spare=store.lease.blocks(),
    )
