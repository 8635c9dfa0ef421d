"""What a parser of tool calls finds in an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the tool begins; pieces of its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the last call's arguments, which together are a JSON text."""

    text: str


Event = Content | CallStart | CallArguments


class Parser(Protocol):
    """Reads one output as it comes. How its text is cut into pieces changes nothing."""

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text makes certain."""

    def finish(self) -> list[Event]:
        """What was held back, once the output is over."""


def merged(events: list[Event]) -> list[Event]:
    """The same with neighbours of one kind joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.text + event.text)
        else:
            joined.append(event)
    return joined
