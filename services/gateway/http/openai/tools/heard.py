"""The calls of one answer, gathered from a parser's events, with the ids that clients see."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from services.gateway.http.openai.tools.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Parser,
)

_ID_CHARS = 24
_SHORT_ID_CHARS = 9  # the templates of Mistral's models refuse all others


@dataclass(slots=True)
class CallPiece:
    """What is new of one call. `name` is "" in all pieces but its first."""

    index: int
    id: str
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Piece:
    """What is new of an answer."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class Heard:
    """Reads one answer. `id_base` makes its ids: the same answer has the same ones again.

    With `is_single` only the first call is told of.
    """

    def __init__(
        self,
        parser: Parser,
        id_base: str,
        *,
        has_short_ids: bool = False,
        is_single: bool = False,
    ) -> None:
        self._has_short_ids = has_short_ids
        self._is_single = is_single
        self._is_dropping = False
        self.num_calls = 0
        self._parser = parser
        self._id_base = id_base

    def add(self, text: str, *, is_last: bool) -> Piece:
        """What the next text of the answer adds to it."""
        events = self._parser.feed(text)
        return self._piece([*events, *self._parser.finish()] if is_last else events)

    def _piece(self, events: list[Event]) -> Piece:
        piece = Piece()
        for event in events:
            match event:
                case Content(text):
                    piece.content += text
                case CallStart() if self._is_single and self.num_calls:
                    self._is_dropping = True
                case CallStart(name):
                    piece.calls.append(CallPiece(self.num_calls, self._call_id(), name))
                    self.num_calls += 1
                case CallArguments(text) if not self._is_dropping:
                    if not piece.calls:
                        piece.calls.append(CallPiece(self.num_calls - 1, ""))
                    piece.calls[-1].arguments += text
        return piece

    def _call_id(self) -> str:
        seed = f"{self._id_base}/{self.num_calls}".encode()
        digest = blake2b(seed).hexdigest()
        return digest[:_SHORT_ID_CHARS] if self._has_short_ids else f"call_{digest[:_ID_CHARS]}"
