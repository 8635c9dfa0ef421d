"""Who has been heard from lately. Pure: time is passed in."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Peer = TypeVar("Peer", bound=Hashable)


class Liveness(Generic[Peer]):
    """Peers not heard from for `timeout_s` are lost (ZeroMQ Guide, Paranoid Pirate)."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._heard_at: dict[Peer, float] = {}  # least recently heard first

    def heard(self, peer: Peer, now: float) -> None:
        self._heard_at.pop(peer, None)
        self._heard_at[peer] = now

    def forget(self, peer: Peer) -> None:
        self._heard_at.pop(peer, None)

    def next_expiry(self, now: float) -> float:
        """The earliest time at which somebody could be lost."""
        return next(iter(self._heard_at.values()), now) + self.timeout_s

    def expire(self, now: float) -> list[Peer]:
        """Forget and return the lost."""
        lost = []
        for peer, heard_at in self._heard_at.items():
            if now - heard_at < self.timeout_s:
                break
            lost.append(peer)
        for peer in lost:
            del self._heard_at[peer]
        return lost
