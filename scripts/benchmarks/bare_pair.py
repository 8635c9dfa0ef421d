"""A bare pair of ZeroMQ sockets, DEALER and ROUTER over TCP, that moves the frames of blocks as the
workers' mover would and does nothing with them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType

import zmq

from common.worker.mover import BYTES_IN_FLIGHT, MESSAGE_BYTES
from scripts.benchmarks.measure import pin
from scripts.benchmarks.store_bytes import LAYOUT, block_of, random_blocks

_BATCH = max(1, MESSAGE_BYTES // LAYOUT.block_bytes)
_WINDOW = max(1, BYTES_IN_FLIGHT // (_BATCH * LAYOUT.block_bytes))
_PUT, _GET, _END = b"put", b"get", b"end"
_TIMEOUT_MS = 30_000


class BarePair:
    """The other end is a process on core `core`."""

    def __init__(self, core: int, num_blocks: int) -> None:
        self._memory = random_blocks(num_blocks)
        self._batches = [
            range(first, min(first + _BATCH, num_blocks)) for first in range(0, num_blocks, _BATCH)
        ]
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_serve, args=(theirs, core, num_blocks), daemon=True)
        self._process.start()
        assert ours.poll(_TIMEOUT_MS / 1000), "the other end did not start"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, _TIMEOUT_MS)
        self._socket.connect(ours.recv())

    def push(self) -> None:
        """All blocks go there."""
        self._exchange([[_PUT, *_frames(self._memory, batch)] for batch in self._batches])

    def pull(self) -> None:
        """As many blocks come from there."""
        self._exchange([[_GET, b"%d" % batch.start] for batch in self._batches])

    def _exchange(self, messages: list[list[bytes | memoryview]]) -> None:
        for number, message in enumerate(messages):
            if number >= _WINDOW:
                self._socket.recv_multipart(copy=False)
            self._socket.send_multipart(message, copy=False)
        for _ in range(min(_WINDOW, len(messages))):
            self._socket.recv_multipart(copy=False)

    def __enter__(self) -> BarePair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.send(_END)
        self._context.destroy(linger=1000)
        self._process.join(_TIMEOUT_MS / 1000)


def _frames(memory: memoryview, numbers: range) -> list[memoryview]:
    return [block_of(memory, number) for number in numbers]


def _serve(pipe: Connection, core: int, num_blocks: int) -> None:
    """The other end, until it is told to end."""
    pin(core)
    memory = random_blocks(num_blocks)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    pipe.send(f"tcp://127.0.0.1:{port}")
    while True:
        peer, kind, *rest = socket.recv_multipart(copy=False)
        if kind.bytes == _PUT:
            socket.send_multipart([peer.bytes, b"ok"])
        elif kind.bytes == _GET:
            first = int(rest[0].bytes)
            numbers = range(first, min(first + _BATCH, num_blocks))
            socket.send_multipart([peer.bytes, b"ok", *_frames(memory, numbers)], copy=False)
        else:
            break
    context.destroy()
