"""The store's second socket: block bytes, for workers that cannot map the arena.

Bytes come and go with digests (common/kv/integrity.py). What does not fit its digest is refused
here, and by workers there: it is computed again and never served.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.kv.integrity import block_digest
from common.messages import (
    BlockBytes,
    CorruptError,
    GetBlocks,
    Heartbeat,
    Hello,
    Member,
    Message,
    Ok,
    PutBlocks,
    StaleError,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.server import Server
from common.service import Seams
from kvbaton.errors import ProtocolError
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members

MAX_BYTES_ASKED = 4 * 1024 * 1024  # in one message, or for one block if that is more


class DataServer:
    """Copies blocks between frames and the arena, for those whom the ledger lets."""

    def __init__(self, seams: Seams, endpoint: str, members: Members, welcome: Welcome) -> None:
        self.num_corrupt = 0
        self.num_bytes_in = 0
        self.num_bytes_out = 0
        self._members = members
        self._welcome = welcome
        self._ledger: Ledger | None = None
        self._arena = memoryview(b"")
        self._block_bytes = 1
        self._arrived: dict[int, tuple[int, bytes]] = {}  # block -> its stamp and digest then
        self._server = Server(
            seams.transport,
            endpoint,
            decoder(ToStore),
            rights=RIGHTS["kvstore data"],
            accept=self._accept,
            handle=self._handle,
            gone=lambda _peer, _member: None,
        )
        self.endpoint = self._server.endpoint

    def serve(self, ledger: Ledger, arena: memoryview, block_bytes: int) -> None:
        """From now on the arena holds this ledger's blocks."""
        self._ledger, self._arena, self._block_bytes = ledger, arena, block_bytes
        self._arrived.clear()

    def is_damaged(self, block: int, key: bytes) -> bool:
        """Whether the bytes of a final block, which came here with a digest, are others by now."""
        stamp, digest = self._arrival(block)
        return digest is not None and block_digest(key, stamp, self._bytes(block)) != digest

    @property
    def num_refused(self) -> int:
        """Messages that their sender had no right to."""
        return self._server.refusals.num

    def close(self) -> None:
        self._server.close()
        self._ledger, self._arena = None, memoryview(b"")

    def _accept(self, _peer: bytes, hello: Hello) -> Welcome:
        self._check_member(hello.member)
        return Welcome(instance_id=self._welcome.instance_id)

    def _check_member(self, member: Member) -> None:
        if member.role == "gateway" or member.member_id not in self._members:
            raise StaleError("this worker is not a member: it must join on the control socket")

    def _handle(self, peer: bytes, message: Message, bulk: Sequence[memoryview]) -> Message | None:
        member = self._server.peers[peer]
        self._check_member(member)
        if isinstance(message, Heartbeat):
            return Ok()
        if isinstance(message, PutBlocks):
            return self._put(member.member_id, message, bulk)
        if isinstance(message, GetBlocks):
            self._get(peer, member.member_id, message)
            return None
        raise ProtocolError(f"{type(message).__name__} belongs on the control socket")

    def _put(self, worker_id: str, message: PutBlocks, bulk: Sequence[memoryview]) -> Ok:
        assert self._ledger is not None
        num_blocks = len(message.blocks)
        if len(bulk) != num_blocks or len(message.digests) != num_blocks:
            raise ProtocolError(
                f"{num_blocks} blocks named, {len(bulk)} frames and {len(message.digests)} digests "
                "sent"
            )
        for frame in bulk:
            if frame.nbytes != self._block_bytes:
                raise ProtocolError(f"a block is {self._block_bytes} bytes, got {frame.nbytes}")
        handoff = self._ledger.find(message.handoff_id, message.epoch)
        handoff.check_writer(self._ledger.pool, worker_id, message.blocks)
        for place, (block, frame) in enumerate(zip(message.blocks, bulk, strict=True)):
            index = message.first_index + place
            is_known = index < len(handoff.keys) or place >= len(message.keys)
            key = handoff.key_of(index) if is_known else message.keys[place]
            stamp = self._ledger.pool[block].stamp
            if block_digest(key, stamp, frame) != message.digests[place]:
                self.num_corrupt += 1
                raise CorruptError(f"the bytes of block {block} do not fit their digest")
            self._bytes(block)[:] = frame
            self._arrived[block] = stamp, message.digests[place]
        self.num_bytes_in += num_blocks * self._block_bytes
        return Ok()

    def _get(self, peer: bytes, worker_id: str, message: GetBlocks) -> None:
        assert self._ledger is not None
        num_asked = len(message.indexes)
        if num_asked > max(1, MAX_BYTES_ASKED // self._block_bytes):
            raise ProtocolError(
                f"indexes may ask for {MAX_BYTES_ASKED} bytes at once, got {num_asked} blocks of "
                f"{self._block_bytes} bytes"
            )
        handoff = self._ledger.find(message.handoff_id, message.epoch)
        blocks = handoff.readable(worker_id, message.indexes)
        frames = [bytes(self._bytes(block)) for block in blocks]
        digests = [
            self._digest(handoff.key_of(index), block, frame)
            for index, block, frame in zip(message.indexes, blocks, frames, strict=True)
        ]
        answer = BlockBytes(call_id=message.call_id, digests=digests)
        self.num_bytes_out += num_asked * self._block_bytes
        self._server.send(peer, answer, frames)

    def _digest(self, key: bytes, block: int, data: bytes) -> bytes:
        """The digest with which the bytes came, if they came here: so it goes from end to end."""
        stamp, digest = self._arrival(block)
        return block_digest(key, stamp, data) if digest is None else digest

    def _arrival(self, block: int) -> tuple[int, bytes | None]:
        """A block's stamp, and the digest with which what it holds came here, if it did."""
        assert self._ledger is not None
        stamp = self._ledger.pool[block].stamp
        arrived_stamp, digest = self._arrived.get(block, (-1, b""))
        return stamp, digest if arrived_stamp == stamp else None

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]
