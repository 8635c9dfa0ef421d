"""What can happen to the messages of some pipes. Each counts how many it has struck."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.loop import virtual_loop

if TYPE_CHECKING:
    from tests.sim.network import Pipe

Frames = list[memoryview]


@dataclass(eq=False)
class Disturbance:
    """Begins and ends with SimNetwork.begin and end. `pipes` says which it is for."""

    pipes: Callable[[Pipe], bool]
    num_struck: int = 0
    holds = False  # what arrives waits until the end

    @property
    def delay_s(self) -> tuple[float, float] | None:
        """The range of delays, if it is not the usual."""
        return None

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]] | None:
        """What is sent instead, each after some seconds; None: the message as it is."""
        return None


class Hold(Disturbance):
    """A partition whose ends do not notice: everything arrives after it has healed."""

    holds = True


@dataclass(eq=False)
class Slow(Disturbance):
    """Messages take longer."""

    most_s: float = 0.1

    @property
    def delay_s(self) -> tuple[float, float]:
        return self.most_s / 10, self.most_s

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]] | None:
        self.num_struck += 1
        return None


@dataclass(eq=False)
class Chance(Disturbance):
    """Strikes a `share` of all messages."""

    rng: random.Random = random.Random(0)
    share: float = 1.0

    def strikes(self) -> bool:
        """Whether it strikes the next message."""
        if self.rng.random() >= self.share:
            return False
        self.num_struck += 1
        return True


class Lose(Chance):
    """Messages vanish, and neither end is told."""

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]] | None:
        return [] if self.strikes() else None


class Repeat(Chance):
    """Messages come twice, the second time a while later."""

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]] | None:
        if not self.strikes():
            return None
        return [(0.0, frames), (self.rng.choice([0.0, 0.01, 0.3]), list(frames))]


class Flip(Chance):
    """One byte of a bulk frame changes on its way."""

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]] | None:
        if len(frames) > 1 and self.strikes():
            index = self.rng.randrange(1, len(frames))
            flipped = bytearray(frames[index])
            flipped[self.rng.randrange(len(flipped))] ^= 1 << self.rng.randrange(8)
            frames[index] = memoryview(flipped)
        return None


@dataclass(eq=False)
class Narrow(Disturbance):
    """A link that carries so many bytes a second: messages leave it one after another."""

    bytes_per_s: float = 1e6
    free_at: float = 0.0

    def on_send(self, frames: Frames) -> list[tuple[float, Frames]]:
        self.num_struck += 1
        now = virtual_loop().time()
        num_bytes = sum(frame.nbytes for frame in frames)
        self.free_at = max(self.free_at, now) + num_bytes / self.bytes_per_s
        return [(self.free_at - now, frames)]
