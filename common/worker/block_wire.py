"""Block bytes between a worker and a store: over its connections, compressed where that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.kv.encodings import INT8, decode, encode
from common.kv.layout import KvLayout
from common.messages import BlockBytes, GetBlocks, PutBlocks, Welcome
from common.net.link import Link
from common.seams import Clock
from common.service import Aside
from common.worker.moving import Moving, Way
from kvbaton.errors import ProtocolError

Frames = Sequence[bytes | memoryview]


class BlockWire:
    """Connections to one store's data socket. A message takes the one on which the fewest wait:
    nothing depends on the order of two. `encodings`: what the store has said that it can read."""

    def __init__(
        self, links: Sequence[Link], layout: KvLayout, moving: Moving, clock: Clock, aside: Aside
    ) -> None:
        self.links = links
        self.encodings: Sequence[str] = ()
        self._layout = layout
        self._moving = moving
        self._clock = clock
        self._aside = aside

    def welcomed(self, welcome: Welcome) -> None:
        """A connection has been welcomed."""
        self.encodings = welcome.encodings

    async def put(
        self, message: PutBlocks, blocks: Frames, digests: Callable[[Frames], list[bytes]]
    ) -> None:
        """Send blocks, with the digests of what is read there. Raises what the store raised, or
        ConnectionLostError."""
        way, frames = self._moving.pushes, blocks
        message.encoding = self._encoding(way)
        with self._timed(way, message.encoding, len(blocks)):
            if message.encoding:
                frames = await self._aside(encode, message.encoding, blocks, self._layout)
            if message.encoding == INT8:
                blocks = await self._aside(decode, INT8, frames, self._layout)
            message.digests = digests(blocks)
            await self._link().call(message, frames)

    async def get(self, message: GetBlocks) -> tuple[list[bytes], Frames]:
        """The digests of blocks, and their bytes, to be taken before anything else is waited for.
        Raises ProtocolError for what is no answer to it."""
        num_blocks = len(message.indexes)
        message.encoding = self._encoding(self._moving.pulls)
        with self._timed(self._moving.pulls, message.encoding, num_blocks):
            answer, bulk = await self._link().call_bulk(message)
            assert isinstance(answer, BlockBytes)
            if not num_blocks == len(answer.digests) == len(bulk):
                raise ProtocolError(f"asked for {num_blocks} blocks, {len(bulk)} came")
            frames: Frames = bulk
            if answer.encoding:
                if answer.encoding != message.encoding:
                    raise ProtocolError(f"blocks came as {answer.encoding}, which nobody asked for")
                frames = await self._aside(decode, answer.encoding, bulk, self._layout)
        block_bytes = self._layout.block_bytes
        for frame in frames:
            if len(frame) != block_bytes:
                raise ProtocolError(f"a block is {block_bytes} bytes, got {len(frame)}")
        return answer.digests, frames

    def close(self) -> None:
        for link in self.links:
            link.close()

    def _encoding(self, way: Way) -> str:
        """Of the next message."""
        wanted = self._moving.encoding(way, self._clock.now())
        return wanted if wanted in self.encodings else ""

    def _link(self) -> Link:
        return min(self.links, key=lambda each: each.num_waiting)

    @contextmanager
    def _timed(self, way: Way, encoding: str, num_blocks: int) -> Iterator[None]:
        """Of a message that brings so many blocks; one that fails brings none."""
        rate, num_bytes = way.coded if encoding else way.plain, 0
        rate.begin(self._clock.now())
        try:
            yield
            num_bytes = num_blocks * self._layout.block_bytes
        finally:
            rate.end(num_bytes, self._clock.now())
