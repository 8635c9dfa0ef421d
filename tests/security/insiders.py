"""Who has a key and says what no honest peer does: whole messages, after a real handshake."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from random import Random

import zmq

from common.messages import INTERNAL_VERSION, Heartbeat, Hello, Member
from common.net.order import first_number
from kvbaton.codec import encode
from kvbaton.keys import client_curve
from kvbaton.protocol import PROTOCOL_VERSION, Generate
from kvbaton.protocol import Hello as ClientHello
from kvbaton.sockets import Curve, EventSocket
from tests.security.curves import keys_of
from tests.security.hostile import hostile

# With whose keys each kind of port is attacked.
ROLES = {
    "client": ("client", "admin"),
    "to_store": ("gateway", "decode"),
    "to_worker": ("gateway",),
}
_LAST_ID = 0x5EED5EED  # of the last message: its answer names it
_PATIENCE_S = 20.0


def curve_of(folder: Path, role: str, server_role: str) -> Curve:
    """For a socket of that role's, which connects to a server of the other."""
    if server_role != "gateway":
        return keys_of(folder, role).connecting(server_role)
    curve = client_curve(folder, role)
    assert curve is not None
    return curve


def insider_messages(rng: Random, union: str, role: str, count: int) -> list[list[bytes]]:
    """A hello that is in order, so many messages of a frame or of several, and the last one."""
    made = [[_hello(role)]]
    for _ in range(count):
        frames = [hostile(rng, union)]
        if rng.random() < 0.2:
            frames += [rng.randbytes(rng.choice([0, 1, 64, 5000])) for _ in range(rng.randrange(4))]
        made.append(frames if rng.random() < 0.98 else [b""] * 1000)
    last = Generate(id=_LAST_ID) if union == "client" else Heartbeat(call_id=_LAST_ID)
    return [*made, [encode(last)]]


def _hello(role: str) -> bytes:
    if role in ("client", "admin"):
        return encode(ClientHello(protocol_version=PROTOCOL_VERSION))
    member = Member(member_id="f" * 32, role=role, name="insider", host_id="h", pid=1)
    return encode(Hello(internal_version=INTERNAL_VERSION, member=member, number=first_number(1)))


async def say(port: int, curve: Curve, messages: list[list[bytes]]) -> None:
    """Send all that, and read until the last is answered. Raises TimeoutError if it never is."""
    is_answered = asyncio.Event()

    def on_frames(frames: list[memoryview]) -> None:
        if any(_LAST_ID.to_bytes(4) in bytes(frame) for frame in frames):
            is_answered.set()

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = EventSocket(context, zmq.DEALER, on_frames, linger_ms=0)
    with context, closing(dealer):
        dealer.secure(curve)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for frames in messages:
            assert dealer.send(frames)
        await asyncio.wait_for(is_answered.wait(), _PATIENCE_S)
