"""ZeroMQ sockets driven by the event loop through their file descriptor.

ZeroMQ signals readiness by edge: after the descriptor fires, and after every send, the socket must
be asked again, or a message can lie unread. Reading stops after a batch to let others run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import zmq
from zmq.utils.monitor import parse_monitor_message

HIGH_WATER_MARK = 10_000  # messages a pipe holds
READ_BATCH = 64
MAX_FRAME_BYTES = 256 * 1024 * 1024  # ZeroMQ hangs up on a peer that sends more
HANDSHAKE_TIMEOUT_MS = 10_000  # and on one that has not said by then who it is
ZAP_DOMAIN = b"kvbaton"
COPY_BELOW_BYTES = 64 * 1024  # zero-copy pays for large frames only

# As plain numbers: every operation on zmq's own makes another member of its enumeration.
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.NOBLOCK | zmq.SNDMORE)


@dataclass(frozen=True, slots=True)
class Curve:
    """Keys of one end of a CURVE connection (Z85). `server_key` is the public key of the binding
    end, for the one that connects; "" at the binding end."""

    public_key: str
    secret_key: str
    server_key: str = ""


class EventSocket:
    """One socket: what arrives goes to `on_frames`, sends never wait.

    `user` is who sent what `on_frames` is given, in the words of the ZAP handler; "" where peers
    need no key. Configure `raw`, then `connect`, or bind it and `start`. Belongs to the loop that
    made it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        on_frames: Callable[[list[memoryview]], None],
        *,
        linger_ms: int,
    ) -> None:
        self.user = ""
        self.raw = context.socket(kind)
        self.raw.setsockopt(zmq.LINGER, linger_ms)
        self.raw.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self.raw.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self.raw.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self.raw.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        self.raw.setsockopt(zmq.IPV6, 1)
        self._on_frames = on_frames
        self._knows_users = False
        self._loop = asyncio.get_running_loop()
        self._pending: asyncio.Handle | None = None
        self._descriptor: int | None = None
        self._monitor: EventSocket | None = None

    def secure(self, curve: Curve) -> None:
        """Encrypt and authenticate; before it is bound or connected. To bind takes a ZAP handler:
        without one everybody is refused."""
        self.raw.setsockopt(zmq.CURVE_PUBLICKEY, curve.public_key.encode())
        self.raw.setsockopt(zmq.CURVE_SECRETKEY, curve.secret_key.encode())
        if curve.server_key:
            self.raw.setsockopt(zmq.CURVE_SERVERKEY, curve.server_key.encode())
        else:
            self.raw.setsockopt(zmq.CURVE_SERVER, 1)
            self.raw.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            self.raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self._knows_users = True

    def watch(self, events: int, on_event: Callable[[int], None]) -> None:
        """Call back with each of these zmq.EVENT_* that befalls its connections."""
        name = f"inproc://monitor-{id(self)}"
        self.raw.monitor(name, events)

        def on_frames(frames: list[memoryview]) -> None:
            on_event(int(parse_monitor_message([bytes(frame) for frame in frames])["event"]))

        self._monitor = EventSocket(self.raw.context, zmq.PAIR, on_frames, linger_ms=0)
        self._monitor.raw.connect(name)
        self._monitor.start()

    def connect(self, endpoint: str) -> None:
        """Connect, again and again when the peer is away, and start. Raises zmq.ZMQError."""
        self.raw.setsockopt(zmq.RECONNECT_IVL, 50)
        self.raw.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self.raw.connect(endpoint)
        self.start()

    def start(self) -> None:
        """Begin to read."""
        self._descriptor = self.raw.fileno()
        self._loop.add_reader(self._descriptor, self._read)
        self._schedule()

    def send(self, frames: Sequence[bytes | memoryview]) -> bool:
        """Queue a message. False if the peer is gone, its queue full, or the socket closed."""
        if self.raw.closed:
            return False
        is_small = all(len(frame) < COPY_BELOW_BYTES for frame in frames)
        is_queued = True
        try:
            for frame in frames[:-1]:
                self.raw.send(frame, _SNDMORE, copy=is_small)
            self.raw.send(frames[-1], _NOBLOCK, copy=is_small)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            is_queued = False
        # Any send, a refused one too, may have taken the edge that tells of an arrival.
        if self._has_arrival():
            self._schedule()
        return is_queued

    def close(self) -> None:
        """Idempotent. Last words have `linger_ms` to leave, which the context waits for."""
        if self.raw.closed:
            return
        if self._pending is not None:
            self._pending.cancel()
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
        if self._monitor is not None:
            self.raw.disable_monitor()
            self._monitor.close()
        self.raw.close()

    def _schedule(self) -> None:
        if self._pending is None:
            self._pending = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        for _ in range(READ_BATCH):
            if self.raw.closed or not self._has_arrival():
                return
            frames = self._receive()
            try:
                if self._knows_users:
                    self.user = cast(str, frames[-1].get("User-Id"))
                self._on_frames([frame.buffer for frame in frames])
            except BaseException:
                self._schedule()  # no further edge would tell of what is left
                raise
        if not self.raw.closed:
            self._schedule()

    def _has_arrival(self) -> bool:
        """To ask costs less than a receive that finds nothing."""
        return bool(cast(int, self.raw.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _receive(self) -> list[zmq.Frame]:
        frames = [self.raw.recv(_NOBLOCK, copy=False)]
        while frames[-1].more:
            frames.append(self.raw.recv(_NOBLOCK, copy=False))
        return frames


def reason(error: zmq.ZMQError) -> str:
    """What went wrong, without the address that pyzmq adds to some messages."""
    return zmq.strerror(error.errno or 0)
