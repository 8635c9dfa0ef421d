"""What the OpenAI endpoints take, typed."""

from __future__ import annotations

import msgspec

Unread = msgspec.Raw | msgspec.UnsetType


class StreamOptions(msgspec.Struct, frozen=True):
    """Whether usage comes with the last chunk, or with every chunk, and whether each tells which
    worker made its tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_worker: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True, frozen=True):
    """What both endpoints have in common. null means the default everywhere.

    What is raw here is read by the one who knows what to make of it.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None  # tokens a chunk
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | bool | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    extra_key: str | None = None  # SGLang's name for more of the same
    priority: int | None = None
    request_id: str | None = None
    rid: str | None = None  # SGLang's name for it
    session_id: str | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    explain: bool | None = None
    response_format: Unread = msgspec.UNSET
    structured_outputs: Unread = msgspec.UNSET
    guided_json: Unread = msgspec.UNSET
    guided_regex: Unread = msgspec.UNSET
    guided_choice: Unread = msgspec.UNSET
    guided_grammar: Unread = msgspec.UNSET
    regex: Unread = msgspec.UNSET
    ebnf: Unread = msgspec.UNSET
    json_schema: Unread = msgspec.UNSET


class CompletionRequest(GenerationFields, kw_only=True, frozen=True):
    """POST /v1/completions. `prompt`: text, texts, token ids or lists of token ids."""

    prompt: msgspec.Raw
    logprobs: int | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Unread = msgspec.UNSET
    tool_call_id: Unread = msgspec.UNSET


class ChatRequest(GenerationFields, kw_only=True, frozen=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Unread = msgspec.UNSET
    documents: Unread = msgspec.UNSET
    reasoning_effort: str | None = None
    tools: Unread = msgspec.UNSET
    tool_choice: Unread = msgspec.UNSET
    parallel_tool_calls: bool | None = None


# Known, and without influence on the answer.
IGNORED_FIELDS = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
})  # fmt: skip
