"""The answering end of a connection: hello first, then typed messages, each refusal in words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from common.messages import INTERNAL_VERSION, Failed, Hello, Member, Message, Welcome
from common.net.transport import Frame, Transport
from kvbaton.codec import Decoder, encode
from kvbaton.errors import KvbatonError, ProtocolError
from kvbaton.protocol import HELLO_REQUIRED

log = structlog.get_logger()

# Called with (peer, message, bulk frames); what it returns answers the call.
Handler = Callable[[bytes, Message, Sequence[memoryview]], Message | None]


def failed(error: KvbatonError, call_id: int) -> Failed:
    """The error as an answer."""
    return Failed(
        call_id=call_id,
        code=error.code,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


class Server:
    """A ROUTER that speaks common.messages.

    `accept(peer, hello)` answers a hello with a welcome or raises KvbatonError to refuse it.
    `gone(peer, member)` is called, later and not from within a send, when a peer could no longer be
    sent to: it is forgotten, and must say hello again.
    """

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[Message],
        *,
        accept: Callable[[bytes, Hello], Welcome],
        handle: Handler,
        gone: Callable[[bytes, Member], None],
    ) -> None:
        self._decoder = decoder
        self._accept = accept
        self._handle = handle
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self.peers: dict[bytes, Member] = {}
        self._socket = transport.router(endpoint, self._on_frames)
        self.endpoint = self._socket.endpoint

    def send(self, peer: bytes, message: Message, bulk: Sequence[Frame] = ()) -> bool:
        """Queue a message; a peer that cannot take it is forgotten and must say hello again."""
        return peer in self.peers and self._send(peer, message, bulk)

    def _send(self, peer: bytes, message: Message, bulk: Sequence[Frame]) -> bool:
        if self._socket.send(peer, [encode(message), *bulk]):
            return True
        member = self.forget(peer)
        if member is not None:
            self._loop.call_soon(self._gone, peer, member)
        return False

    def forget(self, peer: bytes) -> Member | None:
        """Listen to the peer no more until it says hello again. Returns who it was."""
        return self.peers.pop(peer, None)

    def close(self) -> None:
        self._socket.close()

    def _on_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        call_id = 0
        try:
            if not frames:
                raise ProtocolError("empty message")
            message = self._decoder.decode(frames[0])
            call_id = message.call_id
            answer = self._answer(peer, message, frames[1:])
        except KvbatonError as error:
            if isinstance(error, ProtocolError):
                log.warning("message_refused", reason=error.message)
            answer = failed(error, call_id)
        except Exception:
            # A defect here; the peer must not wait for an answer, nor others suffer.
            log.exception("message_failed")
            answer = failed(KvbatonError("internal error"), call_id)
        if answer is not None:
            answer.call_id = call_id
            self._send(peer, answer, [])

    def _answer(self, peer: bytes, message: Message, bulk: Sequence[memoryview]) -> Message | None:
        if isinstance(message, Hello):
            if message.internal_version != INTERNAL_VERSION:
                raise ProtocolError(
                    f"internal protocol version {message.internal_version} is not supported, "
                    f"this process speaks {INTERNAL_VERSION}"
                )
            welcome = self._accept(peer, message)
            self.peers[peer] = message.member
            return welcome
        if peer not in self.peers:
            return Failed(code=HELLO_REQUIRED, message="say hello first")
        return self._handle(peer, message, bulk)
