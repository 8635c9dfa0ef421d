"""What a prefill or a decode worker decides for itself; the runtime does the rest."""

from __future__ import annotations

from typing import Protocol

from common.engine.work import Sampled, Work
from common.messages import Load, Message
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink


class Role(Protocol):
    """What makes a worker a prefill or a decode worker."""

    def load(self) -> Load:
        """How busy the worker is."""

    def on_gateway(self, peer: bytes, message: Message) -> Message | None:
        """A request from a gateway; may raise KvbatonError."""

    def on_store(self, store: StoreLink, message: Message) -> None:
        """A push from a store."""

    def sequences(self) -> list[Sequence]:
        """Every sequence held, in any state."""

    def hand_on(self) -> None:
        """The worker is to leave: give up what has not begun, hand on what another can go on with.
        Called between steps until nothing is held any more."""

    def stop(self, sequence: Sequence) -> None:
        """Plan the sequence no more: it is over. Its blocks may still be in use."""

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence whose blocks nothing uses any more."""

    def plan(self) -> list[tuple[Sequence, Work]]:
        """The next step; empty when there is nothing to do now."""

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """What the step brought for one sequence; its `num_computed` is already advanced."""
