"""The store's second socket: block bytes, for workers that cannot map the arena."""

from __future__ import annotations

from collections.abc import Sequence

from common.messages import (
    BlockBytes,
    GetBlocks,
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
from common.net.server import Server
from common.service import Seams
from kvbaton.errors import ProtocolError
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members


class DataServer:
    """Copies blocks between frames and the arena, for those whom the ledger lets."""

    def __init__(self, seams: Seams, endpoint: str, members: Members, welcome: Welcome) -> None:
        self._members = members
        self._welcome = welcome
        self._ledger: Ledger | None = None
        self._arena = memoryview(b"")
        self._block_bytes = 1
        self._server = Server(
            seams.transport,
            endpoint,
            decoder(ToStore),
            accept=self._accept,
            handle=self._handle,
            gone=lambda _peer, _member: None,
        )
        self.endpoint = self._server.endpoint

    def serve(self, ledger: Ledger, arena: memoryview, block_bytes: int) -> None:
        """From now on the arena holds this ledger's blocks."""
        self._ledger, self._arena, self._block_bytes = ledger, arena, block_bytes

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
        if isinstance(message, PutBlocks):
            return self._put(member.member_id, message, bulk)
        if isinstance(message, GetBlocks):
            self._get(peer, member.member_id, message)
            return None
        raise ProtocolError(f"{type(message).__name__} belongs on the control socket")

    def _put(self, worker_id: str, message: PutBlocks, bulk: Sequence[memoryview]) -> Ok:
        assert self._ledger is not None
        if len(bulk) != len(message.blocks):
            raise ProtocolError(f"{len(message.blocks)} blocks named, {len(bulk)} frames sent")
        self._ledger.check_writer(message.handoff_id, message.epoch, worker_id, message.blocks)
        for block, frame in zip(message.blocks, bulk, strict=True):
            if frame.nbytes != self._block_bytes:
                raise ProtocolError(f"a block is {self._block_bytes} bytes, got {frame.nbytes}")
            self._bytes(block)[:] = frame
        return Ok()

    def _get(self, peer: bytes, worker_id: str, message: GetBlocks) -> None:
        assert self._ledger is not None
        self._ledger.check_reader(message.handoff_id, message.epoch, worker_id, message.blocks)
        frames = [bytes(self._bytes(block)) for block in message.blocks]
        self._server.send(peer, BlockBytes(call_id=message.call_id), frames)

    def _bytes(self, block: int) -> memoryview:
        return self._arena[block * self._block_bytes : (block + 1) * self._block_bytes]
