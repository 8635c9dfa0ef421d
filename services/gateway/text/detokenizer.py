"""Token ids to text, one token at a time, and the stop strings that end a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are not a whole character
# A character has at most 4 bytes, one token each at worst: a longer tail is broken, not incomplete.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """Turns tokens into text as they come; all pieces joined are the text of all tokens decoded.

    `decode` maps ids to text. `hidden` ids (special tokens) have no text. A character whose bytes
    lie in several tokens appears with the last of them.

    Each token costs one or two decodings of a few tokens, however long the text: a window over the
    last tokens is decoded, its first `_num_whole` tokens being the context that decides how the
    next one looks, such as whether it begins with a blank.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], hidden: Collection[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._num_whole = 0
        self._num_shown = 0  # characters of the window's text that were returned already

    def add(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_cut = text.endswith(_INCOMPLETE)
        if not is_cut and len(text) > self._num_shown:
            piece = text[self._num_shown :]
            self._slide(self._num_whole, is_cut=False)
            self._num_whole = len(self._window)
            return piece
        num_pending = len(self._window) - self._num_whole
        if num_pending <= _MAX_PENDING_TOKENS:
            return ""
        # Only the last replacement character may still change.
        piece = text[self._num_shown : len(text) - is_cut]
        self._slide(len(self._window) - _MAX_PENDING_TOKENS, is_cut=is_cut)
        self._num_whole = 0
        return piece

    def flush(self) -> str:
        """The rest: an incomplete character shows as replacement characters."""
        text = self._decode(self._window)
        piece = text[self._num_shown :]
        self._num_shown = len(text)
        return piece

    def _slide(self, num_tokens: int, *, is_cut: bool) -> None:
        del self._window[:num_tokens]
        self._num_shown = len(self._decode(self._window)) - is_cut


class StopStrings:
    """Ends a text before the first of some strings, holding back what may be its beginning.

    The string that is complete first wins, and of those complete at once the longest: how the text
    is cut into pieces changes nothing. Each character costs one step per string (Knuth, Morris and
    Pratt), however long the strings.
    """

    def __init__(self, stop: Sequence[str], *, is_shown: bool = False) -> None:
        """`stop`: none of them empty. `is_shown`: the text ends after the string, not before it."""
        self._is_shown = is_shown
        self._strings = [(text, _borders(text)) for text in stop]
        self._num_matched = [0] * len(stop)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The text that can no longer be part of a stop string. `matched` is set at the end."""
        if not self._strings:
            return text
        self._held += text
        first = len(self._held) - len(text)
        for end, character in enumerate(text, first + 1):
            for index, (string, borders) in enumerate(self._strings):
                matched = self._num_matched[index]
                while matched and string[matched] != character:
                    matched = borders[matched - 1]
                matched += string[matched] == character
                self._num_matched[index] = matched
                if matched == len(string) and len(string) > len(self.matched or ""):
                    self.matched = string
            if self.matched is not None:
                shown = self._held[: end if self._is_shown else end - len(self.matched)]
                self._held = ""
                return shown
        num_shown = len(self._held) - max(self._num_matched)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
