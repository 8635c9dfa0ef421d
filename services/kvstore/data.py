"""The store's second socket: block bytes, for workers that cannot map the arena.

Bytes come and go with digests (common/kv/integrity.py). What does not fit its digest is refused
here, and by workers there: it is computed again and never served. What is encoded for a slow link
is decoded beside the event loop, and what lies in a worker's memory is fetched there (nixl.py);
then it is put as if it had come so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.kv.encodings import INT8, PLANES, decode, encode
from common.kv.integrity import block_digest
from common.kv.layout import KvLayout
from common.messages import (
    BlockBytes,
    CorruptError,
    GetBlocks,
    Heartbeat,
    Hello,
    Member,
    Message,
    OfferMemory,
    Ok,
    PutBlocks,
    StaleError,
    ToStore,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.nixl import Agent
from common.net.server import Server, failed
from common.service import Seams, Tasks
from kvbaton.errors import KvbatonError, OverloadedError, ProtocolError
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members
from services.kvstore.nixl import WorkersMemory

MAX_BYTES_ASKED = 4 * 1024 * 1024  # in one message, or for one block if that is more
MAX_CODED = 32  # messages of one peer that are decoded, encoded, fetched or brought at once
ENCODINGS = [PLANES, INT8]


class DataServer:
    """Copies blocks between frames and the arena, for those whom the ledger lets."""

    def __init__(
        self,
        seams: Seams,
        tasks: Tasks,
        endpoint: str,
        members: Members,
        welcome: Welcome,
        *,
        agent: Agent | None = None,
    ) -> None:
        """`agent`: to move bytes by NIXL too."""
        self.num_corrupt = 0
        self.num_bytes_in = 0
        self.num_bytes_out = 0
        self._tasks = tasks
        self._aside = seams.aside
        self._memory = (
            WorkersMemory(agent, seams.aside, lambda each: each in members) if agent else None
        )
        self._num_coded: Counter[bytes] = Counter()  # messages under way, by peer
        self._members = members
        self._welcome = welcome
        self._ledger: Ledger | None = None
        self._arena = memoryview(b"")
        self._layout: KvLayout | None = None
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

    def serve(self, ledger: Ledger, arena: memoryview, layout: KvLayout) -> None:
        """From now on the arena holds this ledger's blocks."""
        self._ledger, self._arena = ledger, arena
        self._layout, self._block_bytes = layout, layout.block_bytes
        self._arrived.clear()
        if self._memory is not None:
            self._memory.serve(layout.block_bytes)

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
        if self._memory is not None:
            self._memory.close()
        self._ledger, self._arena = None, memoryview(b"")

    def _accept(self, _peer: bytes, hello: Hello) -> Welcome:
        self._check_member(hello.member)
        return Welcome(
            instance_id=self._welcome.instance_id,
            encodings=ENCODINGS,
            nixl=self._memory is not None,
        )

    def _check_member(self, member: Member) -> None:
        if member.role == "gateway" or member.member_id not in self._members:
            raise StaleError("this worker is not a member: it must join on the control socket")

    def _handle(self, peer: bytes, message: Message, bulk: Sequence[memoryview]) -> Message | None:
        member = self._server.peers[peer]
        self._check_member(member)
        if isinstance(message, Heartbeat):
            return Ok()
        if isinstance(message, PutBlocks | GetBlocks | OfferMemory) and _takes_time(message):
            if self._num_coded[peer] >= MAX_CODED:
                raise OverloadedError(f"{MAX_CODED} messages of this worker are under way")
            self._num_coded[peer] += 1
            self._tasks.spawn(self._answer_later(peer, member, message, list(bulk)), "blocks")
            return None
        if isinstance(message, PutBlocks):
            return self._put(member.member_id, message, bulk)
        if isinstance(message, GetBlocks):
            self._server.send(peer, *self._get(member.member_id, message))
            return None
        raise ProtocolError(f"{type(message).__name__} belongs on the control socket")

    async def _answer_later(
        self,
        peer: bytes,
        member: Member,
        message: PutBlocks | GetBlocks | OfferMemory,
        bulk: list[memoryview],
    ) -> None:
        """As without encoding or offset, with arithmetic or a transfer before or after it."""
        answer: Message
        frames: Sequence[bytes | memoryview] = []
        try:
            if isinstance(message, OfferMemory) or message.offset is not None:
                answer = await self._by_memory(member, message)
            elif isinstance(message, PutBlocks):
                self._check_num_blocks(len(bulk))
                blocks = await self._aside(decode, message.encoding, bulk, self._layout)
                self._check_member(member)  # it may be gone by now, its handoff over
                answer = self._put(member.member_id, message, blocks)
            else:
                answer, frames = await self._encoded(member.member_id, message)
        except KvbatonError as error:
            answer, frames = failed(error, message.call_id), []
        finally:
            self._num_coded[peer] -= 1
            if not self._num_coded[peer]:
                del self._num_coded[peer]
        answer.call_id = message.call_id
        self._server.send(peer, answer, frames)

    async def _by_memory(
        self, member: Member, message: PutBlocks | GetBlocks | OfferMemory
    ) -> Message:
        """As with frames, which lie, or are wanted, in memory that the worker has offered. All is
        checked as it is once they are here, and sent as it was when they were asked for."""
        memory, worker_id = self._memory, member.member_id
        if memory is None:
            raise ProtocolError("this store does not use NIXL: blocks go as frames")
        if isinstance(message, OfferMemory):
            await memory.accept(worker_id, message)
            return Ok()
        assert message.offset is not None
        if isinstance(message, PutBlocks):
            num_blocks = len(message.blocks)
            with memory.lent(num_blocks) as piece:
                blocks = await memory.read(worker_id, message.offset, piece, num_blocks)
                self._check_member(member)  # it may be gone by now, its handoff over
                return self._put(worker_id, message, blocks)
        answer, frames = self._get(worker_id, message)
        with memory.lent(len(frames)) as piece:
            await memory.write(worker_id, message.offset, piece, frames)
        answer.is_placed = True
        return answer

    async def _encoded(
        self, worker_id: str, message: GetBlocks
    ) -> tuple[BlockBytes, Sequence[bytes | memoryview]]:
        """The answer, with frames of blocks as they were when they were asked for. Where those that
        are read from them are others, they get digests of their own, if those here are sound."""
        encoding, layout = message.encoding, self._layout
        answer, blocks = self._get(worker_id, message)
        names = self._names(worker_id, message) if encoding == INT8 else []
        frames: Sequence[bytes | memoryview] = await self._aside(encode, encoding, blocks, layout)
        if encoding == INT8:
            read = await self._aside(decode, encoding, frames, layout)
            answer.digests = [
                block_digest(*name, now) if block_digest(*name, block) == digest else digest
                for name, block, digest, now in zip(
                    names, blocks, answer.digests, read, strict=True
                )
            ]
        answer.encoding = encoding
        return answer, frames

    def _check_num_blocks(self, num_blocks: int) -> None:
        if num_blocks > max(1, MAX_BYTES_ASKED // self._block_bytes):
            raise ProtocolError(
                f"a message may ask for {MAX_BYTES_ASKED} bytes at once, or bring so many encoded, "
                f"got {num_blocks} blocks of {self._block_bytes} bytes"
            )

    def _put(self, worker_id: str, message: PutBlocks, bulk: Sequence[bytes | memoryview]) -> Ok:
        assert self._ledger is not None
        num_blocks = len(message.blocks)
        if len(bulk) != num_blocks or len(message.digests) != num_blocks:
            raise ProtocolError(
                f"{num_blocks} blocks named, {len(bulk)} frames and {len(message.digests)} digests "
                "sent"
            )
        for frame in bulk:
            if len(frame) != self._block_bytes:
                raise ProtocolError(f"a block is {self._block_bytes} bytes, got {len(frame)}")
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

    def _get(self, worker_id: str, message: GetBlocks) -> tuple[BlockBytes, list[bytes]]:
        assert self._ledger is not None
        self._check_num_blocks(len(message.indexes))
        handoff = self._ledger.find(message.handoff_id, message.epoch)
        blocks = handoff.readable(worker_id, message.indexes)
        frames = [bytes(self._bytes(block)) for block in blocks]
        digests = [
            self._digest(handoff.key_of(index), block, frame)
            for index, block, frame in zip(message.indexes, blocks, frames, strict=True)
        ]
        answer = BlockBytes(call_id=message.call_id, digests=digests)
        self.num_bytes_out += len(frames) * self._block_bytes
        return answer, frames

    def _names(self, worker_id: str, message: GetBlocks) -> list[tuple[bytes, int]]:
        """The keys and stamps of the blocks asked for, which their digests are bound to."""
        assert self._ledger is not None
        handoff = self._ledger.find(message.handoff_id, message.epoch)
        blocks = handoff.readable(worker_id, message.indexes)
        keys = map(handoff.key_of, message.indexes)
        return list(zip(keys, [self._ledger.pool[block].stamp for block in blocks], strict=True))

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


def _takes_time(message: PutBlocks | GetBlocks | OfferMemory) -> bool:
    if isinstance(message, OfferMemory):
        return True
    return bool(message.encoding) or message.offset is not None
