"""Keys for tests, and what a socket comes to that connects with some, or with none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import zmq

from common.net.access import Access, Keys
from kvbaton.sockets import Curve, EventSocket

ADMIN_KEY = "only the operators of this cluster know it"
PATIENCE_S = 10.0
SAID = b"let me in"
_OUTCOMES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


def keys_of(folder: Path, role: str) -> Keys:
    """What a service of this role reads at its start."""
    keys = Access(role, str(folder), insecure=False, binds=[]).load()
    assert keys is not None
    return keys


def stranger(server_key: str) -> Curve:
    """A pair that nobody knows."""
    public_key, secret_key = zmq.curve_keypair()
    return Curve(public_key.decode(), secret_key.decode(), server_key)


def with_keys(curve: Curve) -> Callable[[EventSocket], None]:
    return lambda socket: socket.secure(curve)


def without_keys(_socket: EventSocket) -> None:
    """Nothing to configure."""


async def outcome(endpoint: str, configure: Callable[[EventSocket], None]) -> str:
    """How the handshake of a DEALER ends that has something to say there: SUCCEEDED, FAILED_AUTH,
    ..."""
    came: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_event(event: int) -> None:
        if not came.done():
            came.set_result(event)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = EventSocket(context, zmq.DEALER, lambda _frames: None, linger_ms=100)
    with context, closing(dealer):
        configure(dealer)
        dealer.watch(_OUTCOMES, on_event)
        dealer.connect(endpoint)
        dealer.send([SAID])
        event = zmq.Event(await asyncio.wait_for(came, PATIENCE_S))
        return str(event.name).removeprefix("HANDSHAKE_")
