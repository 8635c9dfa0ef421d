"""What a client and a gateway can say to each other. docs/protocol.md is normative.

Frames: a client's DEALER sends [message], the gateway's ROUTER answers [message] on the same
connection; a message is one MessagePack map whose `type` names one of the structs below.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvbaton.admin import MAX_ID_CHARS, StoreAudit, StoreHistory
from kvbaton.codec import Decoder
from kvbaton.conversation import ChatMessage, ToolCall
from kvbaton.explanation import Explanation
from kvbaton.operations import Operation, Outcome
from kvbaton.questions import Answer, Prompt, Question
from kvbaton.sampling import SamplingParams
from kvbaton.wire import WireMessage

PROTOCOL_VERSION = 1
MAX_REQUEST_BYTES = 8 * 1024 * 1024
MAX_CHOICES = 128  # of one request
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_CACHE_SALT_CHARS = 256
MAX_DEADLINE_MS = 2**31 - 1
MAX_REQUESTS_IN_FLIGHT = 1024  # of one connection
PING_INTERVAL_S = 5.0
CLIENT_TIMEOUT_S = 30.0  # a gateway forgets a client that was silent for so long


class Hello(WireMessage, frozen=True, tag="hello"):
    """The first message of every connection, client to gateway."""

    protocol_version: int
    client: str = ""


class Welcome(WireMessage, frozen=True, tag="welcome"):
    """The gateway's answer to hello. `instance_id` changes when the gateway restarts."""

    protocol_version: int
    instance_id: str
    model: str
    max_model_len: int | None = None


class Resumed(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The output of a choice that its client has, and its `finish_reason` if that was all."""

    tokens: list[int] = []
    finish_reason: str | None = None


class Resume(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Where a request goes on: `request_id` and `seed` as a gateway had accepted it, the output
    that its client has, and its `finish_reason` if that was all. With n above 1 these two are in
    `choices`, once for each."""

    request_id: str
    seed: int
    tokens: list[int] = []
    finish_reason: str | None = None
    choices: list[Resumed] = []


class Generate(WireMessage, frozen=True, tag="generate"):
    """Ask for tokens. `id` is the client's own number, unique among its requests in flight.

    Exactly one of `text`, `token_ids` and `messages` is given. `resumable` asks for `accepted`.
    With `resume`, only the tokens that come after those in it are sent.
    """

    id: int
    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    model: str | None = None
    sampling: SamplingParams = SamplingParams()
    stop: list[str] = []
    deadline_ms: int | None = None
    cache_salt: str | None = None
    resumable: bool = False
    resume: Resume | None = None
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    bad_words: list[str] = []
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    priority: int = 0
    user: str | None = None
    session_id: str | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    explain: bool = False
    traceparent: str | None = None


class Cancel(WireMessage, frozen=True, tag="cancel"):
    """Stop request `id`. Answered by its `error` with code "cancelled"; unknown ids are ignored."""

    id: int


class Ping(WireMessage, frozen=True, tag="ping"):
    """Asks for a sign of life; a client with requests in flight sends one when all is quiet."""


class Audit(WireMessage, frozen=True, tag="audit"):
    """An operator asks whether the books of every KV store close. Answered by `audited`."""

    id: int
    admin_key: str


class Why(WireMessage, frozen=True, tag="why"):
    """An operator asks what happened to a block, or to a request or handoff. Answered by `told`.

    Exactly one of `block` and `name` is given; `store` is needed where there are several.
    """

    id: int
    admin_key: str
    block: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    store: int | None = None
    name: Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)] | None = None


class Pong(WireMessage, frozen=True, tag="pong"):
    """The answer to ping."""

    instance_id: str


class Accepted(WireMessage, frozen=True, tag="accepted"):
    """Request `id`, which is resumable, is under way. `request_id` and `seed` are what another
    gateway has to be told, should this one be lost."""

    id: int
    request_id: str
    seed: int


class Token(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One output token. `text` may be empty: a character may need several tokens."""

    index: int
    token_id: int
    text: str = ""
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []
    choice: int = 0


class Tokens(WireMessage, frozen=True, tag="tokens"):
    """The next tokens of one choice of request `id`, in order of index, without gaps. With a finish
    reason they are its last; after the last of every choice `done` follows."""

    id: int
    tokens: list[Token]
    finish_reason: str | None = None


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """Token counts of a finished request."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


class Timings(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Where a request's time went, in milliseconds since the gateway received it."""

    placed_ms: float = 0.0
    prefilled_ms: float = 0.0
    handed_over_ms: float = 0.0
    first_token_ms: float = 0.0
    finished_ms: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    num_attempts: int = 1


class FinishedChoice(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How a choice ended. With tools, `content` is its text without the calls in it."""

    finish_reason: str
    num_output_tokens: int
    content: str | None = None
    tool_calls: list[ToolCall] = []


class Done(WireMessage, frozen=True, tag="done"):
    """Request `id` finished. finish_reason: "stop" or "length", or "tool_calls" if there were
    tools; that of the first of several choices. `choices` are there for n above 1 or with tools."""

    id: int
    finish_reason: str
    usage: Usage
    timings: Timings
    request_id: str = ""
    choices: list[FinishedChoice] = []
    explanation: Explanation | None = None


class Audited(WireMessage, frozen=True, tag="audited"):
    """The books of every store. `closes`: every store answered and every count agrees."""

    id: int
    closes: bool
    stores: list[StoreAudit]


class Told(WireMessage, frozen=True, tag="told"):
    """What every store remembers of what was asked about."""

    id: int
    stores: list[StoreHistory]


class Error(WireMessage, frozen=True, tag="error"):
    """Request `id` failed, or, without an id, a message was refused that names no request.

    Codes are those of kvbaton.errors, and "hello_required": say hello, then repeat.
    """

    code: str
    message: str
    id: int | None = None
    field: str | None = None
    retry_after_s: float | None = None


HELLO_REQUIRED = "hello_required"

AdminQuestion = Audit | Why | Operation  # what takes the admin key
AdminAnswer = Audited | Told | Outcome
Request = Generate | Question | AdminQuestion  # what is answered by its id
ClientMessage = Hello | Cancel | Ping | Request
GatewayMessage = Welcome | Accepted | Prompt | Tokens | Done | Error | Pong | Answer | AdminAnswer


def client_message_decoder() -> Decoder[ClientMessage]:
    """Decodes what clients send; bounded by MAX_REQUEST_BYTES."""
    return Decoder(ClientMessage, MAX_REQUEST_BYTES)


def gateway_message_decoder() -> Decoder[GatewayMessage]:
    """Decodes what gateways send."""
    return Decoder(GatewayMessage)
