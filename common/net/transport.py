"""The Transport seam: ROUTER and DEALER sockets as callbacks. Live it is ZeroMQ, in tests memory.

Sends never wait: a peer that cannot take more is a peer in trouble, and the caller decides. A frame
is bytes, or a memoryview that the sender keeps unchanged until the message has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.config import StartError
from kvbaton.sockets import MAX_FRAME_BYTES

Frame = bytes | memoryview
Frames = Sequence[Frame]

# Called with the peer's routing id, the frames, and the user of its key (common/net/access.py): ""
# where no keys are used. The id is the peer's own choice, the user is not.
RouterHandler = Callable[[bytes, list[memoryview], str], None]
DealerHandler = Callable[[list[memoryview]], None]


class RouterSocket(Protocol):
    """The bound end: many peers, each named by its routing id."""

    endpoint: str

    def send(self, peer: bytes, frames: Frames) -> bool:
        """Queue frames for `peer`; False if it is gone or its queue is full."""

    def close(self) -> None: ...


class DealerSocket(Protocol):
    """The connecting end: one peer, reconnected by the transport when it comes back."""

    def send(self, frames: Frames) -> bool:
        """Queue frames; False if the queue is full."""

    def close(self) -> None: ...


class Transport(Protocol):
    """Makes sockets. Handlers run on the event loop, one message at a time, in order per pipe."""

    def router(
        self,
        endpoint: str,
        handler: RouterHandler,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        slow_reader_s: float | None = None,
    ) -> RouterSocket:
        """Bind; port 0 or "*" takes a free one. A peer that sends a longer frame is hung up on, and
        so is one that takes nothing of what waits for it for `slow_reader_s`. Raises TransportError
        when it cannot."""

    def dealer(
        self,
        endpoint: str,
        handler: DealerHandler,
        lost: Callable[[], None] | None = None,
        role: str = "",
    ) -> DealerSocket:
        """Connect, now or as soon as the peer is there, with a fresh routing id. `lost()` is called
        when a connection that was there has ended. Where keys are used, only who has the key of
        `role` is connected to."""

    def close(self) -> None: ...


class TransportError(StartError):
    """A socket could not be bound or connected; the message names the endpoint."""
