"""What gateways and workers say to each other."""

from __future__ import annotations

from typing import Annotated

import msgspec

from common.messages.base import (
    Count,
    Key,
    Load,
    MemberId,
    Message,
    RequestName,
    TokenId,
    Traceparent,
)
from common.messages.reports import WorkReport
from common.scores import MAX_SCORES_BYTES
from kvbaton.sampling import SamplingParams


class _Request(Message):
    """What both workers of a request need to know of it.

    `tokens` are the prompt and, when the request is placed again, its output so far;
    `num_prompt_tokens` tells where the output begins. `worker_id` is the member that the handoff
    was opened for: a later incarnation of it refuses. From `root_key` and the tokens follow the
    keys of the blocks, and with them what their digests must be. `ttft_left_ms`: within what the
    first token is wanted; 0: there is no such target, or it cannot be met any more. `request_id`
    and `traceparent` are for logs.
    """

    handoff_id: str
    epoch: int
    worker_id: MemberId
    store: int
    root_key: Key
    tokens: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    num_prompt_tokens: Count
    sampling: SamplingParams
    choice: Count
    ttft_left_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    request_id: RequestName = ""
    traceparent: Traceparent = ""


class Reserve(_Request, tag="reserve"):
    """Gateway to decode: keep a place for this request. Answered by ok when there is one.

    `prefill_here`: compute the prompt yourself. `first_token`: the KV of all `tokens` is there,
    claim it and go on after this one. `tpot_target_ms`: what its tokens may take, 0 for any time.
    """

    prefill_here: bool = False
    first_token: TokenId | None = None
    tpot_target_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Prefill(_Request, tag="prefill"):
    """Gateway to prefill: compute the prompt, draw one token. Answered by ok at once."""


class OutputToken(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One token of one request; `index` counts the request's output from 0. The first from a worker
    that computed the prompt brings the `prompt_scores` that were asked for (common/scores.py)."""

    handoff_id: str
    index: Count
    token_id: TokenId
    logprob: float = 0.0
    top_logprobs: list[tuple[int, float]] = []
    finish_reason: str | None = None
    report: WorkReport | None = None  # with the first token from here
    prompt_scores: Annotated[bytes, msgspec.Meta(max_length=MAX_SCORES_BYTES)] = b""


class OutputTokens(Message, tag="tokens"):
    """Worker to gateway: what one step brought for its requests, and the load after it."""

    tokens: list[OutputToken]
    load: Load


class Dropped(Message, tag="dropped"):
    """Worker to gateway: the request cannot go on here. It may be placed again, unless `code` says
    that the request itself is wrong; then `field` may name what in it."""

    handoff_id: str
    code: str
    message: str
    field: str | None = None
