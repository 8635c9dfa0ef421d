"""The ZAP handler: libzmq asks it about every key that comes, and it answers with the key's user.

One per ZeroMQ context, which is one per process. pyzmq's own authenticator wants its own poller and
knows no users but keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils import z85

from common.config import StartError
from common.net.refusals import Refusals
from kvbaton.sockets import ZAP_DOMAIN, Curve, EventSocket

PROOF_TIMEOUT_S = 10.0
_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_NUM_FRAMES = 7  # version, request id, domain, address, routing id, mechanism, the key
_OUTCOMES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def user_of(request: Sequence[bytes], users: Mapping[str, str]) -> str:
    """Whose key a ZAP request is about; "" if nobody's. `users` are by public key (Z85)."""
    if len(request) != _NUM_FRAMES or request[0] != _VERSION:
        return ""
    domain, mechanism, key = request[2], request[5], request[6]
    if domain != ZAP_DOMAIN or mechanism != b"CURVE":
        return ""
    return users.get(z85.encode(key).decode(), "")


class ZapHandler:
    """Lets in the keys of `users`, each as its user, and nobody else."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], users: Mapping[str, str]) -> None:
        self._context = context
        self._users = users
        self._refusals = Refusals("key")
        self._wrong_key = b""  # ours, which is to be refused
        self._socket = EventSocket(context, zmq.REP, self._on_frames, linger_ms=0)
        self._socket.raw.bind(_ENDPOINT)
        self._socket.start()

    async def prove(self, endpoint: str, server_key: str) -> None:
        """Try to get in at `endpoint`, a socket of this context, with a key that nobody knows.
        Raises StartError unless it is refused because of the key."""
        public_key, secret_key = zmq.curve_keypair()
        self._wrong_key = z85.decode(public_key)
        outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_event(event: int) -> None:
            if not outcome.done():
                outcome.set_result(event)

        probe = EventSocket(self._context, zmq.DEALER, lambda _frames: None, linger_ms=0)
        try:
            probe.secure(Curve(public_key.decode(), secret_key.decode(), server_key))
            probe.watch(_OUTCOMES, on_event)
            probe.connect(endpoint)
            async with asyncio.timeout(PROOF_TIMEOUT_S):
                event = zmq.Event(await outcome)
        except TimeoutError:
            raise StartError(f"a wrong key was not refused in {PROOF_TIMEOUT_S:g} s") from None
        finally:
            probe.close()
        if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise StartError(f"a wrong key was not refused: {event.name}")

    def close(self) -> None:
        """After every other socket of the context."""
        self._socket.close()

    def _on_frames(self, frames: list[memoryview]) -> None:
        request = [bytes(frame) for frame in frames]
        request_id = request[1] if len(request) > 1 else b""
        user = user_of(request, self._users)
        if not user and request[-1] != self._wrong_key:
            self._refusals.add()
        status, text = (b"200", b"OK") if user else (b"400", b"this key is not known")
        self._socket.send([_VERSION, request_id, status, text, user.encode(), b""])
