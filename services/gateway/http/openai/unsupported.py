"""Request fields that would change the answer, but that this server does not have yet.

A client that sets one is told so: an answer that ignores it would be wrong in silence. Their
default values are accepted, because many clients send those.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvbaton.errors import InvalidRequestError

_MAX_DEFAULT_BYTES = 64  # the longest default, written with blanks

_NULL: tuple[Any, ...] = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {}, "")
_OFF: tuple[Any, ...] = (None, False)

_BOTH: dict[str, tuple[Any, ...]] = {
    "chat_template": _EMPTY,
    "custom_params": _EMPTY,
    "kv_transfer_params": _EMPTY,
    "length_penalty": (None, 1),
    "logits_processors": _EMPTY,
    "lora_path": _EMPTY,
    "prompt_embeds": _EMPTY,
    "suffix": _EMPTY,
    "use_beam_search": _OFF,
}
_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": _NULL,
    "function_call": (None, "none", "auto"),
    "functions": _EMPTY,
    "modalities": (None, ["text"]),
    "prediction": _NULL,
    "web_search_options": _NULL,
}
_RESPONSES: dict[str, tuple[Any, ...]] = {
    "response_format": _NULL,
    "top_logprobs": (None, 0),
}
# Not for lack of time: a template is a program.
_NEVER = ("chat_template",)


class UnsupportedFields:
    """Finds the fields of one endpoint in a body, without building their values."""

    def __init__(self, defaults: dict[str, tuple[Any, ...]]) -> None:
        self._defaults = defaults
        kind = msgspec.Raw | msgspec.UnsetType
        fields = [(name, kind, msgspec.UNSET) for name in defaults]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Unsupported", fields))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._defaults)

    def check(self, body: bytes) -> None:
        """Raise InvalidRequestError for a field with a value that means something.

        The body has been decoded before, so it is valid JSON.
        """
        found = self._decoder.decode(body)
        for name, accepted in self._defaults.items():
            raw = getattr(found, name)
            if raw is msgspec.UNSET:
                continue
            is_short = len(raw) <= _MAX_DEFAULT_BYTES
            if not is_short or msgspec.json.decode(raw) not in accepted:
                raise InvalidRequestError(_reason(name), field=name)


def _reason(name: str) -> str:
    if name in _NEVER:
        return f"{name} is refused: conversations are laid out by the model's own template"
    return f"{name} is not supported yet"


COMPLETION_FIELDS = UnsupportedFields(_BOTH)
CHAT_FIELDS = UnsupportedFields({**_BOTH, **_CHAT})
RESPONSES_FIELDS = UnsupportedFields({**_BOTH, **_RESPONSES})
