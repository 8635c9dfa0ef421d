"""The seam between the two faces of the gateway (HTTP, msgpack) and the dispatcher behind them.

A face turns a request into token ids and sampling parameters, calls `Backend.submit`, and reads
tokens in order. It never learns which worker made them, nor of retries.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kvbaton.sampling import SamplingParams
from services.gateway.observe.timeline import Attempts
from services.gateway.routing.decision import Decision


class TokenEvent(msgspec.Struct, frozen=True):
    """One token. `index` counts output tokens from 0; the last event alone has a finish reason.

    finish_reason: "stop" (eos or a stop token id, which is then token_id), "length".
    """

    index: int
    token_id: int
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    worker: str = ""  # who made it


@dataclass(slots=True)
class Timeline:
    """When things happened to a request, in seconds on the gateway's clock; 0.0 = not yet.

    From `received_at` to `submitted_at` it was read, checked and tokenized.
    """

    received_at: float = 0.0
    submitted_at: float = 0.0
    placed_at: float = 0.0
    prefilled_at: float = 0.0
    handed_over_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    num_attempts: int = 0
    finish_reason: str = ""  # also when a stop string ended it
    error: str = ""  # the code of what else ended it
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    traceparent: str = ""
    attempts: Attempts = field(default_factory=Attempts)


@dataclass(frozen=True, slots=True)
class PromptToken:
    """How likely the model found one token of the prompt after those before it, and what it found
    likeliest there."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class TokenStream(Protocol):
    """The tokens of one request, in order, without gaps or duplicates.

    Iteration raises a KvbatonError if the request fails; leaving it early requires `cancel`.
    `prompt_logprobs` are there with the first token if they were asked for, one for each token of
    the prompt but the first. `placement` is the latest attempt's, None before the first.
    """

    request_id: str
    timeline: Timeline
    num_cached_tokens: int
    prompt_logprobs: list[PromptToken]
    placement: Decision | None

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def cancel(self) -> None:
        """Free what the request holds anywhere in the cluster. Idempotent, never blocks."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The latencies that a request wants, in milliseconds; 0.0 for none."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0

    def or_else(self, default: Targets) -> Targets:
        """These, and the default's where there is none."""
        return Targets(self.ttft_ms or default.ttft_ms, self.tpot_ms or default.tpot_ms)


NO_TARGETS = Targets()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request as the dispatcher sees it: tokens in, tokens out.

    `resumed` is the output that its client has from another gateway: it goes on after that.
    `priority`: lower goes first, as in vLLM. Requests of one `session_id` like the same workers.
    `traceparent` is that of W3C Trace Context. `owner` is the tenant whose request it is, `tenant`
    the one whose cache it uses. `received_at` 0.0: just now.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    choice: int = 0
    n: int = 1  # choices of the same prompt, this one included
    tenant: str = ""
    cache_salt: str = ""  # prompts share cached blocks only with those of the same salt
    deadline_s: float | None = None
    resumed: tuple[int, ...] = ()
    priority: int = 0
    session_id: str = ""
    targets: Targets = NO_TARGETS
    traceparent: str = ""
    owner: str = ""
    received_at: float = 0.0


class Backend(Protocol):
    """The dispatcher, as the faces see it."""

    @property
    def max_model_len(self) -> int | None:
        """Most positions of prompt plus output; None while no worker has joined."""

    @property
    def ready(self) -> bool:
        """Whether a worker of every role needed is alive."""

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Start a request.

        Raises UnavailableError when no worker of a needed role is alive, OverloadedError when the
        gateway's own queue is full, InvalidRequestError when the prompt does not fit the context.
        """

    def stats(self) -> dict[str, float]:
        """Counts and gauges by name, for /metrics and for `stats`."""
