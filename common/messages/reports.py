"""What only a worker knows of how its first token of a request came to be."""

from __future__ import annotations

from typing import Annotated

import msgspec

from common.messages.base import Count

MAX_CHUNKS = 64

# Milliseconds before the message: clocks differ.
Ago = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class ChunkReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Engine steps, one after another, and how many positions of the request they computed, and of
    all requests in them."""

    started_ms: Ago
    ended_ms: Ago
    num_tokens: Count
    num_batched_tokens: Count
    num_steps: Count = 1


class WorkReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Times are in milliseconds before the message. `joined_ms`: all blocks were there, and what
    they hold could be read, so that it could be computed. `suspended_ms`: it gave way before that.
    `num_late_bytes` had not come when prefill was done, or when there was nothing else to do."""

    arrived_ms: Ago
    joined_ms: Ago
    suspended_ms: Ago = 0.0
    chunks: Annotated[list[ChunkReport], msgspec.Meta(max_length=MAX_CHUNKS)] = []
    num_early_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    num_late_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
