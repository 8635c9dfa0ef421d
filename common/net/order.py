"""The numbers of a connection's messages: each is handled once, in order, and a loss shows.

The hello that begins a connection carries its first number, and so does the welcome; what either
end says next carries the next. A link's later connections have greater numbers, so that what
belongs to a former connection is never taken for news of this one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from common.messages import Message
from kvbaton.codec import Decoder
from kvbaton.errors import ProtocolError

_COUNT_BITS = 40  # a thousand messages a second for 34 years; 24 bits are left for connections


def first_number(connection: int) -> int:
    """The first number of a link's connection, counted from 0: 1, 2, 3, ... for the very first."""
    return connection << _COUNT_BITS | 1


def is_first(number: int) -> bool:
    """Whether a connection may begin with it."""
    return number > 0 and number == first_number(number >> _COUNT_BITS)


def is_of_connection(number: int, first: int) -> bool:
    """Whether a number belongs to the connection that began with `first`."""
    return number >> _COUNT_BITS == first >> _COUNT_BITS


class Verdict(enum.Enum):
    """What a number says of its message."""

    NEXT = "next"
    SEEN = "seen"  # or of a former connection
    GAP = "gap"  # what was sent before it has not come


class Incoming:
    """What has come of one connection. `expected` is the number of the message to come."""

    __slots__ = ("expected",)

    def __init__(self, expected: int) -> None:
        self.expected = expected

    def take(self, number: int) -> Verdict:
        """Judge a message that has come. One that is NEXT counts as handled."""
        if number == self.expected:
            self.expected += 1
            return Verdict.NEXT
        return Verdict.SEEN if number < self.expected else Verdict.GAP


class _Envelope(msgspec.Struct):
    """What every message carries; any other key is ignored."""

    call_id: int = 0
    number: int = 0


_ENVELOPES: Decoder[_Envelope] = Decoder(_Envelope)


def read(
    decoder: Decoder[Message], frames: Sequence[memoryview]
) -> tuple[Message, ProtocolError | None]:
    """The message, or why it is refused beside a bare one with its numbers as far as they can be
    read: a message that makes no sense has its place in the order all the same."""
    if not frames:
        return Message(), ProtocolError("empty message")
    try:
        return decoder.decode(frames[0]), None
    except ProtocolError as error:
        refusal = error
    try:
        envelope = _ENVELOPES.decode(frames[0])
    except ProtocolError:
        return Message(), refusal
    return Message(call_id=envelope.call_id, number=envelope.number), refusal
