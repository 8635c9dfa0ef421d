"""The tokenizer and the chat template of a Hugging Face model folder. No torch, no transformers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from common.config import StartError
from kvbaton.errors import InvalidRequestError
from services.gateway.detokenizer import Detokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_REASON_CHARS = 300


class TextModelError(StartError):
    """A model folder whose tokenizer or chat template cannot be used: names the file and why."""


class TextModel:
    """Text to token ids and back.

    `name` is what clients call the model: the folder's name unless given. `vocab_size` counts the
    ids the model knows. Raises TextModelError for a missing or broken file.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or folder.resolve().name
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = _special_tokens(config)
        self._template = _load_template(folder, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        vocab_size = _read_json(folder / "config.json").get("vocab_size")
        if not isinstance(vocab_size, int):
            vocab_size = self._tokenizer.get_vocab_size()
        self.vocab_size: int = vocab_size
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Raises InvalidRequestError for text that is not Unicode."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # a lone surrogate
            raise InvalidRequestError("text is not valid Unicode", field="prompt") from error
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of a conversation in the model's own format, up to where the answer begins.

        `options` reach the template by name; `add_generation_prompt` is true unless given. Raises
        InvalidRequestError (messages) when there is no template or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                f"the model {self.name} has no chat template", field="messages"
            )
        values = {"add_generation_prompt": True, **self._special_tokens, **options}
        try:
            text = self._template.render(messages=messages, **values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = str(error)[:_MAX_REASON_CHARS]
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {reason}", field="messages"
            ) from error
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh detokenizer for one output."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        return Detokenizer(self._decode, hidden)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _token_text(self, token_id: int) -> str:
        """How one token reads on its own, special tokens included."""
        return self._decode([token_id])


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


def _load_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            source: Any = path.read_text(encoding="utf-8")
        else:
            path = folder / "tokenizer_config.json"
            source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else _environment().from_string(source)
    except (OSError, ValueError, TypeError, LookupError, jinja2.TemplateError) as error:
        raise TextModelError(f"{path}: chat template: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the answers in training data; here it has no meaning."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What chat templates are written for: the environment of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja2's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
