"""The tokenizer and the chat template of a Hugging Face model folder. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.config import StartError
from kvbaton.errors import InvalidRequestError
from services.gateway.http.openai.tools.formats import detect_format
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.generation import tokenize
from services.gateway.text.templates import ChatTemplate, TemplateFailedError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextModelError(StartError):
    """A model folder whose tokenizer or chat template cannot be used: names the file and why."""


class TextModel:
    """Text to token ids and back.

    `name` is what clients call the model: the folder's name unless given. `tool_format` is how it
    writes calls of tools: as its chat template shows unless given. `vocab_size` counts the ids the
    model knows. Raises TextModelError for a missing or broken file.
    """

    def __init__(
        self, folder: Path, name: str | None = None, *, tool_format: str | None = None
    ) -> None:
        self.name = name or folder.resolve().name
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = _special_tokens(config)
        self._template = _load_template(folder, config)
        source = None if self._template is None else self._template.source
        self.tool_format = tool_format or detect_format(source)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        vocab_size = _read_json(folder / "config.json").get("vocab_size")
        if not isinstance(vocab_size, int):
            vocab_size = self._tokenizer.get_vocab_size()
        self.vocab_size: int = vocab_size
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        most_tokens: int | None = None,
        is_end_enough: bool = False,
        field: str = "prompt",
    ) -> list[int]:
        """The ids of a text; with `is_end_enough` at least the last `most_tokens` of them.

        Raises InvalidRequestError (`field`) for text that is not Unicode, or that is sure to have
        more than `most_tokens`: megabytes of it would take half a minute.
        """
        if most_tokens is not None and len(text) > most_tokens * self._longest_token:
            if not is_end_enough:
                raise InvalidRequestError(
                    f"text of {len(text)} characters does not fit the model's context of "
                    f"{most_tokens} tokens",
                    field=field,
                )
            text = text[-most_tokens * self._longest_token :]
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # a lone surrogate
            raise InvalidRequestError("text is not valid Unicode", field=field) from error
        return ids

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        most_tokens: int | None = None,
        is_end_enough: bool = False,
        add_special_tokens: bool = False,
        continues: bool = False,
        **options: Any,
    ) -> list[int]:
        """The ids of a conversation in the model's own format, up to where the answer begins.

        With `continues` that is after the last message's text, which the answer goes on from.
        `options` reach the template by name; `add_generation_prompt` is true unless given. Raises
        InvalidRequestError (messages) when there is no template or it refuses the messages, and
        what `encode` raises.
        """
        if self._template is None:
            raise InvalidRequestError(
                f"the model {self.name} has no chat template", field="messages"
            )
        values = {"add_generation_prompt": True, **self._special_tokens, **options}
        try:
            text = await self._template.render({"messages": messages, **values})
        except TemplateFailedError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}", field="messages"
            ) from error
        if continues:
            text = _cut_after(text, str(messages[-1].get("content", "")))
        return await tokenize(
            len(text),
            lambda: self.encode(
                text,
                add_special_tokens=add_special_tokens,
                most_tokens=most_tokens,
                is_end_enough=is_end_enough,
                field="messages",
            ),
        )

    def close(self) -> None:
        """End the process of the chat template."""
        if self._template is not None:
            self._template.close()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh detokenizer for one output."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        return Detokenizer(self._decode, hidden)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids that the model has."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_name(self, token_id: int) -> str:
        """What the vocabulary calls a token; "" for an id that it does not use."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _decode(self, token_ids: list[int]) -> str:
        return self.decode(token_ids, skip_special_tokens=False)

    def _token_text(self, token_id: int) -> str:
        """How one token reads on its own, special tokens included."""
        return self._decode([token_id])


def _cut_after(text: str, final: str) -> str:
    """A conversation up to the end of its last message. Templates may strip that of blanks."""
    bare = final.strip()
    begin = text.rfind(bare)
    if not bare or begin < 0:
        raise InvalidRequestError(
            "continue_final_message needs a last message with text that the model's chat template "
            "shows",
            field="continue_final_message",
        )
    whole = final.lstrip()
    return text[: begin + len(whole if text.startswith(whole, begin) else bare)]


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise TextModelError(f"{path}: no such file; a Hugging Face model folder has one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TextModelError(f"{path}: not a tokenizer: {error}") from error
    # Some models ship training-time settings that would cut or fill up prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TextModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise TextModelError(f"{path}: must hold a JSON object")
    return values


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _load_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            source: Any = path.read_text(encoding="utf-8")
        else:
            path = folder / "tokenizer_config.json"
            source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else ChatTemplate(source)
    except (OSError, ValueError, TypeError, LookupError, TemplateFailedError) as error:
        raise TextModelError(f"{path}: chat template: {error}") from error
