"""One tool call, read character by character: where it begins, its arguments, where it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Protocol

from services.gateway.http.openai.tools.events import CallArguments, CallStart, Event

MAX_NAME_CHARS = 128

_BLANKS = " \t\r\n"
_Step = Callable[[str], list[Event]]
_ARGUMENTS = ("arguments", "parameters")  # both are in use for the same


class Call(Protocol):
    """A call under way. Once it `is_bad` or `is_done` it takes no more."""

    has_begun: bool  # its name is known and was told
    is_done: bool
    is_bad: bool  # the character just added does not belong to a call

    def add(self, character: str) -> list[Event]:
        """What the next character makes certain."""


class JsonValue:
    """Finds the end of one JSON value. What is between its brackets is not checked."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
        self._is_scalar = False
        self._in_string = False
        self._is_escaped = False

    def add(self, character: str) -> bool:
        """Whether the character belongs to the value. `is_done` is set with its last one, or for
        numbers, true, false and null with the one that comes after."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                self.is_done = self._depth == 0
        elif self._is_scalar:
            self.is_done = character in _BLANKS + ",]}"
            return not self.is_done
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0
        elif self._depth == 0:
            self._is_scalar = True
        return True


class ObjectCall:
    """{"name": ..., "arguments": {...}}, with the members in any order, and others beside them.

    Arguments are told as they come if the name stands before them. Names other than `names` are no
    call: a model may well answer with an object that has a name.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.has_begun = False
        self.is_done = False
        self.is_bad = False
        self._names = names
        self._step: _Step = self._open
        self._value = JsonValue()
        self._text: list[str] = []  # of the key or value under way
        self._key = ""
        self._name = ""
        self._arguments = ""
        self._is_live = False  # the value under way is told as it comes

    def add(self, character: str) -> list[Event]:
        return self._step(character)

    def _open(self, character: str) -> list[Event]:
        return self._expect(character, {"{": self._before_key})

    def _before_key(self, character: str) -> list[Event]:
        if character == '"':
            self._begin_value(self._in_key)
            return self._in_key(character)
        if character == "}":
            return self._close()
        return self._expect(character, {})

    def _in_key(self, character: str) -> list[Event]:
        self._take(character)
        if self._value.is_done:
            self._key = self._string() or ""
            self._step = self._colon
        return []

    def _colon(self, character: str) -> list[Event]:
        return self._expect(character, {":": self._before_value})

    def _before_value(self, character: str) -> list[Event]:
        if character in _BLANKS:
            return []
        self._begin_value(self._in_value)
        is_arguments = self._key in _ARGUMENTS and character == "{"
        self._is_live = is_arguments and bool(self._name) and not self.has_begun
        started: list[Event] = self._start() if self._is_live else []
        return started + self._in_value(character)

    def _in_value(self, character: str) -> list[Event]:
        belongs = self._take(character)
        events: list[Event] = [CallArguments(character)] if self._is_live and belongs else []
        if self._value.is_done:
            self._step = self._after_value
            if not self._is_live:
                events += self._member()
            if not belongs and not self.is_bad:
                events += self._after_value(character)
        return events

    def _after_value(self, character: str) -> list[Event]:
        if character == "}":
            return self._close()
        return self._expect(character, {",": self._before_key})

    def _member(self) -> list[Event]:
        """A whole member has been read."""
        if self._key == "name" and not self._name:
            name = self._string()
            if name is None or name not in self._names:
                self.is_bad = True
                return []
            self._name = name
            self._step = self._after_value
        elif self._key in _ARGUMENTS and not self.has_begun:
            # Some models write the object as a string.
            text = self._string() if self._text[0] == '"' else "".join(self._text)
            self._arguments = text if text and text != "null" else "{}"
        return self._told_late()

    def _told_late(self) -> list[Event]:
        if self.has_begun or not self._name or not self._arguments:
            return []
        return [*self._start(), CallArguments(self._arguments)]

    def _start(self) -> list[Event]:
        self.has_begun = True
        return [CallStart(self._name)]

    def _close(self) -> list[Event]:
        if not self._name:
            self.is_bad = True
            return []
        self.is_done = True
        if self.has_begun:
            return []
        return [*self._start(), CallArguments("{}")]

    def _expect(
        self, character: str, steps: dict[str, Callable[[str], list[Event]]]
    ) -> list[Event]:
        if character in steps:
            self._step = steps[character]
        elif character not in _BLANKS:
            self.is_bad = True
        return []

    def _begin_value(self, step: _Step) -> None:
        self._value, self._text, self._is_live, self._step = JsonValue(), [], False, step

    def _take(self, character: str) -> bool:
        belongs = self._value.add(character)
        if belongs and not self._is_live:
            self._text.append(character)
        return belongs

    def _string(self) -> str | None:
        """The string that was read; None for what is none."""
        try:
            value = json.loads("".join(self._text))
        except ValueError:
            return None
        return value if isinstance(value, str) else None


class PlainCall:
    """A tool's name and then, perhaps after [ARGS], the object of its arguments."""

    def __init__(self, names: Collection[str]) -> None:
        self.has_begun = False
        self.is_done = False
        self.is_bad = False
        self._names = names
        self._head = ""
        self._value = JsonValue()

    def add(self, character: str) -> list[Event]:
        if self.has_begun:
            self._value.add(character)
            self.is_done = self._value.is_done
            return [CallArguments(character)]
        if character != "{":
            self._head += character
            self.is_bad = len(self._head) > 2 * MAX_NAME_CHARS
            return []
        # [CALL_ID] and an id may stand between the two.
        name = self._head.removesuffix("[ARGS]").partition("[CALL_ID]")[0].strip(_BLANKS)
        if name not in self._names:
            self.is_bad = True
            return []
        self.has_begun = True
        self._value.add(character)
        return [CallStart(name), CallArguments(character)]
