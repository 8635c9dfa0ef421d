"""What happened in a run, as one hash: every delivery and every event, with its virtual time."""

from __future__ import annotations

import asyncio
import hashlib

from tests.sim.network import Pipe, SimNetwork


class Trace:
    """Two runs with equal hashes delivered the same bytes at the same times in the same order.

    `events` are the few things a reader wants to see: faults, and what became of requests.
    """

    def __init__(self, network: SimNetwork) -> None:
        self.events: list[str] = []
        self.num_deliveries = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._started_at = asyncio.get_running_loop().time()
        network.listeners.append(self._on_delivery)

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()

    def note(self, text: str) -> None:
        """Something happened."""
        line = f"{self._now_s():10.6f} {text}"
        self.events.append(line)
        self._digest.update(f"{line}\n".encode())

    def _on_delivery(self, pipe: Pipe, frames: list[memoryview]) -> None:
        self.num_deliveries += 1
        sizes = [len(frame) for frame in frames]
        self._digest.update(f"{self._now_s():.9f} {pipe.name} {sizes}\n".encode())
        for frame in frames:
            self._digest.update(frame)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._started_at
