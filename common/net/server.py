"""The answering end of a connection: hello first, then typed messages, each refusal in words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from common.messages import INTERNAL_VERSION, Failed, Hello, Member, Message, Welcome
from common.messages.rights import Rights, violation
from common.net.access import role_of
from common.net.order import Incoming, Verdict, is_first, read
from common.net.refusals import Refusals
from common.net.transport import Frame, Transport
from kvbaton.codec import Decoder, encode
from kvbaton.errors import ForbiddenError, KvbatonError, ProtocolError
from kvbaton.protocol import HELLO_REQUIRED

log = structlog.get_logger()

MAX_HELLOS = 4096  # peers, known or forgotten, whose last hello is remembered

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


@dataclass(slots=True)
class _Connection:
    """With a known peer: what has come of it, and the number of what is sent next."""

    incoming: Incoming
    next_number: int


class Server:
    """A ROUTER that speaks common.messages with those who have `rights`.

    `accept(peer, hello)` answers a hello with a welcome or raises KvbatonError to refuse it.
    `gone(peer, member)` is called, never from within a send, when a peer could no longer be sent
    to, or something that it sent is lost: it is forgotten, and must say hello again.
    """

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[Message],
        *,
        rights: Rights,
        accept: Callable[[bytes, Hello], Welcome],
        handle: Handler,
        gone: Callable[[bytes, Member], None],
    ) -> None:
        self._decoder = decoder
        self._rights = rights
        self._accept = accept
        self._handle = handle
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self.peers: dict[bytes, Member] = {}
        self.num_ignored = 0  # messages that had come before
        self.refusals = Refusals("message")  # of what the sender had no right to
        self._connections: dict[bytes, _Connection] = {}
        self._hellos: dict[bytes, int] = {}  # number of each peer's last, latest peer last
        self._socket = transport.router(endpoint, self._on_frames)
        self.endpoint = self._socket.endpoint

    def send(self, peer: bytes, message: Message, bulk: Sequence[Frame] = ()) -> bool:
        """Queue a message; a peer that cannot take it is forgotten and must say hello again."""
        return peer in self.peers and self._send(peer, message, bulk)

    def _send(self, peer: bytes, message: Message, bulk: Sequence[Frame]) -> bool:
        connection = self._connections.get(peer)
        if connection is not None:
            # A copy: one message may go to many peers.
            message = msgspec.structs.replace(message, number=connection.next_number)
            connection.next_number += 1
        if self._socket.send(peer, [encode(message), *bulk]):
            return True
        member = self.forget(peer)
        if member is not None:
            self._loop.call_soon(self._gone, peer, member)
        return False

    def forget(self, peer: bytes) -> Member | None:
        """Listen to the peer no more until it says hello again. Returns who it was."""
        self._connections.pop(peer, None)
        return self.peers.pop(peer, None)

    def close(self) -> None:
        self._socket.close()

    def _on_frames(self, peer: bytes, frames: list[memoryview], user: str) -> None:
        message, unreadable = read(self._decoder, frames)
        refusal = unreadable or self._forbidden(peer, message, user)
        try:
            if isinstance(message, Hello):
                answer = self._greet(peer, message, refusal)
            else:
                answer = self._answer(peer, message, refusal, frames[1:])
        except KvbatonError as error:
            if isinstance(error, ProtocolError):
                log.warning("message_refused", reason=error.message)
            answer = failed(error, message.call_id)
        except Exception:
            # A defect here; the peer must not wait for an answer, nor others suffer.
            log.exception("message_failed")
            answer = failed(KvbatonError("internal error"), message.call_id)
        if answer is not None:
            answer.call_id = message.call_id
            self._send(peer, answer, [])

    def _forbidden(self, peer: bytes, message: Message, user: str) -> ForbiddenError | None:
        """Why the sender must not say this; None if it may. It is who its key says: where no keys
        are used, who it claims to be, and until then its message is answered by hello_required."""
        member = message.member if isinstance(message, Hello) else self.peers.get(peer)
        role = role_of(user) or (member.role if member else "")
        if not role:
            return None
        error = violation(self._rights, role, message)
        if member is not None and member.role != role:
            error = ForbiddenError(f"the key is a {role}'s, who must not speak for {member.role}")
        if error is not None:
            self.refusals.add(user=user, reason=error.message)
        return error

    def _greet(self, peer: bytes, hello: Hello, refusal: KvbatonError | None) -> Message | None:
        if refusal is not None:
            raise refusal
        if hello.internal_version != INTERNAL_VERSION:
            raise ProtocolError(
                f"internal protocol version {hello.internal_version} is not supported, "
                f"this process speaks {INTERNAL_VERSION}"
            )
        if not is_first(hello.number):
            raise ProtocolError(f"number {hello.number} of a hello begins no connection")
        if hello.number <= self._hellos.get(peer, 0):
            self._ignore(hello)
            return None
        self._hellos.pop(peer, None)
        self._hellos[peer] = hello.number
        if len(self._hellos) > MAX_HELLOS:
            del self._hellos[next(iter(self._hellos))]
        try:
            welcome = self._accept(peer, hello)
        except Exception:
            self._end(peer)  # for its sender the former connection is over all the same
            raise
        self.peers[peer] = hello.member
        self._connections[peer] = _Connection(Incoming(hello.number + 1), hello.number)
        return welcome

    def _answer(
        self,
        peer: bytes,
        message: Message,
        refusal: KvbatonError | None,
        bulk: Sequence[memoryview],
    ) -> Message | None:
        connection = self._connections.get(peer)
        if connection is None:
            if refusal is not None:
                raise refusal
            return _hello_required(message)
        if message.number < 1:
            raise refusal or ProtocolError(f"number {message.number} of a message is not above 0")
        verdict = connection.incoming.take(message.number)
        if verdict is Verdict.SEEN:
            self._ignore(message)
            return None
        if verdict is Verdict.GAP:
            log.warning("messages_lost", name=self.peers[peer].name)
            self._end(peer)
            return _hello_required(message)
        if refusal is not None:
            raise refusal
        return self._handle(peer, message, bulk)

    def _ignore(self, message: Message) -> None:
        self.num_ignored += 1
        log.debug("message_ignored", type=type(message).__name__, number=message.number)

    def _end(self, peer: bytes) -> None:
        member = self.forget(peer)
        if member is not None:
            self._gone(peer, member)


def _hello_required(message: Message) -> Failed:
    """It carries the number of the message, which tells the connection that is over."""
    return Failed(code=HELLO_REQUIRED, message="say hello first", number=message.number)
