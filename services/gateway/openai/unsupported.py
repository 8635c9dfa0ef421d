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
    "add_generation_prompt": (None, True),
    "allowed_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "best_of": (None, 1),
    "chat_template": _EMPTY,
    "chat_template_kwargs": _EMPTY,
    "custom_params": _EMPTY,
    "ebnf": _EMPTY,
    "echo": _OFF,
    "guided_choice": _EMPTY,
    "guided_grammar": _EMPTY,
    "guided_json": _EMPTY,
    "guided_regex": _EMPTY,
    "include_stop_str_in_output": _OFF,
    "json_schema": _EMPTY,
    "kv_transfer_params": _EMPTY,
    "length_penalty": (None, 1),
    "logit_bias": _EMPTY,
    "logits_processors": _EMPTY,
    "lora_path": _EMPTY,
    "priority": (None, 0),
    "prompt_embeds": _EMPTY,
    "prompt_logprobs": (None, False),
    "regex": _EMPTY,
    "response_format": (None, {"type": "text"}),
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "stream_interval": (None, 1),
    "structured_outputs": _EMPTY,
    "suffix": _EMPTY,
    "truncate_prompt_tokens": _NULL,
    "use_beam_search": _OFF,
}
_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": _NULL,
    "continue_final_message": _OFF,
    "documents": _EMPTY,
    "function_call": (None, "none", "auto"),
    "functions": _EMPTY,
    "modalities": (None, ["text"]),
    "prediction": _NULL,
    "tool_choice": (None, "none", "auto"),
    "tools": _EMPTY,
    "web_search_options": _NULL,
}
# Not for lack of time: a template is a program.
_NEVER = ("chat_template", "chat_template_kwargs")


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
