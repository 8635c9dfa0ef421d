"""The asking end of a connection: calls with answers, pushes, and hello again after a reconnect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog

from common.messages import Failed, Hello, Message, StaleError, Welcome
from common.net.order import Incoming, Verdict, first_number, is_of_connection, read
from common.net.transport import Frame, Transport
from kvbaton.codec import Decoder, encode
from kvbaton.errors import ConnectionLostError, KvbatonError, ProtocolError, error_from_wire
from kvbaton.protocol import HELLO_REQUIRED

log = structlog.get_logger()

CALL_TIMEOUT_S = 60.0


class Link:
    """A DEALER that speaks common.messages, where keys are used only with who has that of `role`.

    `handle(message)` gets what is pushed, and answers that nobody waits for any more: they may have
    brought something that must be given back. `welcomed(welcome)` runs at each welcome: at first,
    and whenever the connection was started anew: the other end had forgotten us (it restarted, or
    the connection broke), or a message was lost. Calls in flight then fail with
    ConnectionLostError. `refused(error)` runs when our hello is refused, `lost()` when a
    connection that was there has ended: the transport connects again by itself.
    """

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[Message],
        *,
        role: str = "",
        hello: Callable[[], Hello],
        welcomed: Callable[[Welcome], None],
        handle: Callable[[Message], None],
        refused: Callable[[KvbatonError], None],
        lost: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._decoder = decoder
        self._hello = hello
        self._welcomed = welcomed
        self._handle = handle
        self._refused = refused
        self._calls: dict[int, asyncio.Future[tuple[Message, list[memoryview]]]] = {}
        self._last_call_id = 0
        self.num_ignored = 0  # messages that had come before, or are of a former connection
        self._num_hellos = 0
        self._first_number = 0  # of this connection, each way
        self._next_number = 0  # of what is sent
        self._incoming = Incoming(0)
        self._hello_call_id = 0
        self._must_greet = False
        self.is_introduced = False  # our last hello was queued: the other end may know us by it
        self._loop = asyncio.get_running_loop()
        self._socket = transport.dealer(endpoint, self._on_frames, lost, role)
        self._say_hello()

    @property
    def num_waiting(self) -> int:
        """Calls that are not answered yet."""
        return len(self._calls)

    def send(self, message: Message, bulk: Sequence[Frame] = ()) -> None:
        """Queue a message without waiting for an answer. One that cannot be queued is lost, and
        with it what the two ends know of each other: we then start anew with a hello."""
        if not self._send(message, bulk):
            log.warning("message_not_sent", endpoint=self.endpoint, type=type(message).__name__)
            self._fail_all("the connection took no more messages")
            self._must_greet = True

    def _send(self, message: Message, bulk: Sequence[Frame]) -> bool:
        if self._must_greet and not self._say_hello():
            return False
        return self._send_numbered(message, bulk)

    def _send_numbered(self, message: Message, bulk: Sequence[Frame]) -> bool:
        numbered = msgspec.structs.replace(message, number=self._next_number)
        if not self._socket.send([encode(numbered), *bulk]):
            return False  # and the number is still free
        self._next_number += 1
        return True

    async def call(
        self,
        message: Message,
        bulk: Sequence[Frame] = (),
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> Message:
        """The answer to a message. Raises what the other end raised, or ConnectionLostError.

        With `timeout_s` None it waits for as long as the other end is there.
        """
        answer, _ = await self.call_bulk(message, bulk, timeout_s)
        return answer

    async def call_bulk(
        self,
        message: Message,
        bulk: Sequence[Frame] = (),
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> tuple[Message, list[memoryview]]:
        """As `call`, with the frames that came with the answer."""
        self._last_call_id += 1
        call_id = message.call_id = self._last_call_id
        future: asyncio.Future[tuple[Message, list[memoryview]]] = self._loop.create_future()
        self._calls[call_id] = future
        timer = (
            None
            if timeout_s is None
            else self._loop.call_later(timeout_s, self._fail, call_id, "no answer in time")
        )
        try:
            if not self._send(message, bulk):
                raise ConnectionLostError(f"{self.endpoint} takes no more messages")
            return await future
        except asyncio.CancelledError:
            # It may have come in the very moment: then it is one that nobody waits for.
            if not future.cancelled() and future.exception() is None:
                self._handle(future.result()[0])
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._calls.pop(call_id, None)

    def close(self) -> None:
        self._socket.close()
        self._fail_all("this end closed the connection")

    def reset(self) -> None:
        """Give up on calls in flight and introduce ourselves again."""
        self._start_anew("the connection was reset")

    def _start_anew(self, reason: str) -> None:
        self._fail_all(reason)
        self._say_hello()

    def _say_hello(self) -> bool:
        hello = self._hello()
        self._last_call_id += 1
        self._hello_call_id = hello.call_id = self._last_call_id
        self._first_number = self._next_number = first_number(self._num_hellos)
        self._num_hellos += 1
        self._incoming = Incoming(self._first_number)
        self.is_introduced = self._send_numbered(hello, [])
        self._must_greet = not self.is_introduced
        return self.is_introduced

    def _fail(self, call_id: int, reason: str) -> None:
        future = self._calls.get(call_id)
        if future is not None and not future.done():
            future.set_exception(ConnectionLostError(f"{self.endpoint}: {reason}"))

    def _fail_all(self, reason: str) -> None:
        for call_id in list(self._calls):
            self._fail(call_id, reason)

    def _on_frames(self, frames: list[memoryview]) -> None:
        message, refusal = read(self._decoder, frames)
        if isinstance(message, Failed) and message.code == HELLO_REQUIRED:
            # Each message in flight draws one: those after the first are of a former connection.
            if is_of_connection(message.number, self._first_number):
                self._start_anew("the other end had forgotten this connection")
        elif isinstance(message, Failed) and not message.number:  # to one it does not know
            self._on_failed(message)
        elif refusal is not None and not message.number:
            self._log_refused(refusal.message)
        elif self._is_next(message):
            self._on_message(message, refusal, frames[1:])

    def _is_next(self, message: Message) -> bool:
        verdict = self._incoming.take(message.number)
        if verdict is Verdict.SEEN:
            self.num_ignored += 1
            log.debug("message_ignored", type=type(message).__name__, number=message.number)
        elif verdict is Verdict.GAP:
            log.warning("messages_lost", endpoint=self.endpoint)
            self._start_anew("a message was lost")
        return verdict is Verdict.NEXT

    def _on_message(
        self, message: Message, refusal: ProtocolError | None, bulk: list[memoryview]
    ) -> None:
        if refusal is not None:
            self._log_refused(refusal.message)
            self._answer(message.call_id, refusal)
        elif isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Failed):
            self._on_failed(message)
        elif message.call_id:
            self._answer(message.call_id, (message, bulk))
        else:
            self._handle(message)

    def _log_refused(self, reason: str) -> None:
        log.error("message_refused", endpoint=self.endpoint, reason=reason)

    def _on_failed(self, failed: Failed) -> None:
        error = (
            StaleError(failed.message)
            if failed.code == StaleError.code
            else error_from_wire(failed.code, failed.message, failed.field, failed.retry_after_s)
        )
        if failed.call_id == self._hello_call_id:
            self._refused(error)
        else:
            if not failed.call_id:
                log.info("message_refused", endpoint=self.endpoint, reason=failed.message)
            self._answer(failed.call_id, error)

    def _answer(
        self, call_id: int, result: tuple[Message, list[memoryview]] | KvbatonError
    ) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            if not isinstance(result, KvbatonError):
                self._handle(result[0])
            return
        if isinstance(result, KvbatonError):
            future.set_exception(result)
        else:
            future.set_result(result)
