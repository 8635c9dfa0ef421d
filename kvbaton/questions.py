"""What a client may ask of a gateway beside generating, and what it is answered.

docs/protocol.md is normative.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvbaton.conversation import ChatMessage
from kvbaton.wire import WireMessage

MAX_SCORED = 128  # texts of one `score`
MAX_DETOKENIZED = 1024 * 1024  # tokens of one `detokenize`


class PromptToken(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One token of a prompt, and how likely the model found it after those before it."""

    index: int
    token_id: int
    text: str = ""
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []


class Prompt(WireMessage, frozen=True, tag="prompt"):
    """The next tokens of a prompt, in order of index, without gaps. `choice` counts the prompts of
    a `score`."""

    id: int
    tokens: list[PromptToken]
    choice: int = 0


class Score(WireMessage, frozen=True, tag="score"):
    """Ask how likely texts are. Answered by a `prompt` or more for each, then by `scored`.

    Exactly one of `texts` and `token_ids` is given.
    """

    id: int
    texts: list[str] | None = None
    token_ids: list[list[int]] | None = None
    model: str | None = None
    top_logprobs: int = 0
    add_special_tokens: bool = True
    deadline_ms: int | None = None
    cache_salt: str | None = None
    priority: int = 0


class Scored(WireMessage, frozen=True, tag="scored"):
    """Every text of a `score` has been told."""

    id: int
    num_prompt_tokens: int
    num_cached_tokens: int = 0


class Tokenize(WireMessage, frozen=True, tag="tokenize"):
    """Ask for the tokens of a text or a conversation: exactly one is given. Answered by
    `tokenized`."""

    id: int
    text: str | None = None
    messages: list[ChatMessage] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    return_token_strs: bool = False


class Tokenized(WireMessage, frozen=True, tag="tokenized"):
    """The tokens, and where it was asked for how each of them reads alone."""

    id: int
    token_ids: list[int]
    token_strs: list[str] = []
    max_model_len: int | None = None


class Detokenize(WireMessage, frozen=True, tag="detokenize"):
    """Ask for the text of tokens. Answered by `detokenized`."""

    id: int
    token_ids: list[int]
    model: str | None = None
    skip_special_tokens: bool = False


class Detokenized(WireMessage, frozen=True, tag="detokenized"):
    """The text."""

    id: int
    text: str


class Models(WireMessage, frozen=True, tag="models"):
    """Ask which models there are. Answered by `model_list`."""

    id: int


class ModelCard(msgspec.Struct, kw_only=True, frozen=True):
    """A model that is served. `id` is its name."""

    id: str
    vocab_size: int
    max_model_len: int | None = None


class ModelList(WireMessage, frozen=True, tag="model_list"):
    """The models."""

    id: int
    models: list[ModelCard]


class Stats(WireMessage, frozen=True, tag="stats"):
    """Ask for the gateway's counts and gauges. Answered by `counted`."""

    id: int


class Counted(WireMessage, frozen=True, tag="counted"):
    """Counts and gauges by name. The names are not part of the protocol."""

    id: int
    stats: dict[str, float]


Question = Score | Tokenize | Detokenize | Models | Stats
Answer = Scored | Tokenized | Detokenized | ModelList | Counted
