"""How models write tool calls, and the parsers that find them in the text of an answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from services.gateway.http.openai.tools.calls import Call, ObjectCall, PlainCall
from services.gateway.http.openai.tools.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    merged,
)

_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Format:
    """`marker` announces calls; then come `opener`, calls with `separator` between, `closer`.

    With `at_start` an answer may also begin with a call, without the marker. `has_plain`: instead
    of the opener a single call may follow as its name and arguments. `marker_is_special`: it is a
    special token, which answers do not show otherwise.
    """

    marker: str
    opener: str = ""
    separator: str = ""
    closer: str = ""
    at_start: bool = False
    has_plain: bool = False
    marker_is_special: bool = False


FORMATS = {
    # Hermes 2 Pro, Qwen 2.5 and 3 and many others.
    "hermes": Format("<tool_call>", closer="</tool_call>"),
    "llama3": Format("<|python_tag|>", separator=";", at_start=True, marker_is_special=True),
    "mistral": Format(
        "[TOOL_CALLS]", opener="[", separator=",", closer="]", has_plain=True,
        marker_is_special=True,
    ),
}  # fmt: skip
# What the grammar of a forced call gives.
ARRAY = Format("", opener="[", separator=",", closer="]", at_start=True)


def detect_format(template: str | None) -> str:
    """The name of the format that a chat template teaches its model; the commonest if none."""
    template = template or ""
    for name, sign in (
        ("hermes", "<tool_call>"),
        ("mistral", "[TOOL_CALLS]"),
        ("llama3", "<|python_tag|>"),
        ("llama3", '{"name": function name, "parameters"'),
    ):
        if sign in template:
            return name
    return "hermes"


class FormatParser:
    """Finds calls in one format. Implements events.Parser.

    Text is held back while it may turn out to be a call: up to the tool's name and the beginning of
    its arguments. What does not turn out so is content, and so is whatever follows a call and is
    not the format's own, but for blanks.
    """

    def __init__(self, layout: Format, names: Collection[str]) -> None:
        self._format = layout
        self._names = names
        self._step: Callable[[str], list[Event]] = self._open if layout.at_start else self._outside
        self._held = ""  # may be, or follows, a marker; shown if no call comes of it
        self._must_open = layout.opener
        self._closing = ""  # how much of the closer has come
        self._is_after_call = False
        self._call: Call = ObjectCall(names)

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for character in text:
            events += self._step(character)
        return merged(events)

    def finish(self) -> list[Event]:
        unread = self._held.strip(_BLANKS + self._format.separator)
        if self._step == self._after or (self._is_after_call and not unread):
            return []
        return [Content(self._held)] if self._held else []

    def _outside(self, character: str) -> list[Event]:
        marker = self._format.marker
        if self._is_after_call and character in _BLANKS and not self._held.strip(_BLANKS):
            self._held += character
            return []
        blanks = ""
        if self._is_after_call:
            found = self._held.lstrip(_BLANKS)
            blanks, self._held = self._held[: len(self._held) - len(found)], found
        self._held += character
        start = 0
        while not marker.startswith(self._held[start:]):
            start += 1
        shown, self._held = self._held[:start], self._held[start:]
        if not shown:
            self._held = blanks + self._held
            if self._held.lstrip(_BLANKS) == marker and marker:
                self._step, self._must_open = self._open, self._format.opener
            return []
        self._is_after_call = False
        return [Content(blanks + shown)]

    def _open(self, character: str) -> list[Event]:
        """After the marker, before the first call."""
        if character in _BLANKS:
            self._held += character
            return []
        if self._must_open and character != self._must_open:
            if not self._format.has_plain:
                return self._give_up(character)
            return self._begin(PlainCall(self._names), character)
        if self._must_open:
            self._must_open = ""
            self._held += character
            return []
        return self._begin(ObjectCall(self._names), character)

    def _begin(self, call: Call, character: str) -> list[Event]:
        self._call, self._step = call, self._in_call
        return self._in_call(character)

    def _in_call(self, character: str) -> list[Event]:
        call = self._call
        had_begun = call.has_begun
        events = call.add(character)
        if call.is_bad:
            return events + self._give_up(character)
        if not had_begun:
            self._held = "" if call.has_begun else self._held + character
        if call.is_done:
            self._closing = ""
            self._step = self._after
            if isinstance(call, PlainCall):
                self._leave()
        return events

    def _after(self, character: str) -> list[Event]:
        """After a call: another, or the end of them."""
        layout = self._format
        if layout.closer.startswith(self._closing + character):
            self._held += character
            self._closing += character
            if self._closing == layout.closer:
                self._leave()
            return []
        if self._closing == "" and character in _BLANKS:
            self._held += character
            return []
        if self._closing == "" and character == layout.separator:
            self._held += character
            self._is_after_call = True
            self._step = self._open
            return []
        self._is_after_call = True
        return self._give_up(character)

    def _leave(self) -> None:
        self._held = ""
        self._is_after_call = True
        self._step = self._outside

    def _give_up(self, character: str) -> list[Event]:
        """What was held back is no call; the character may begin another marker."""
        shown, self._held = self._held, ""
        self._step = self._outside
        if self._is_after_call and not shown.strip(_BLANKS):
            self._held = shown
            return self._outside(character)
        self._is_after_call = False
        return [*([Content(shown)] if shown else []), *self._outside(character)]


class PlainText:
    """An output without calls. Implements events.Parser."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class ForcedCall:
    """The whole output is the arguments of one tool. Implements events.Parser."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        start = [] if self._has_begun else [CallStart(self._name)]
        self._has_begun = True
        return [*start, CallArguments(text)]

    def finish(self) -> list[Event]:
        return []
