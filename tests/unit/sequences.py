"""Sequences as a worker would have them, with only what a test cares about."""

from __future__ import annotations

from typing import Any

from common.worker.sequence import Sequence
from kvbaton.sampling import SamplingParams

ROOT = b"root"


def sequence_of(num_tokens: int = 3, **fields: Any) -> Sequence:
    """A prompt of the tokens 10, 11, ... that just arrived."""
    tokens = list(range(10, 10 + num_tokens))
    defaults: dict[str, Any] = {
        "handoff_id": f"handoff-{fields.get('arrived_at', 0)}",
        "epoch": 1,
        "store": 0,
        "incarnation": "member",
        "gateway": b"gateway",
        "root_key": ROOT,
        "tokens": tokens,
        "num_prompt_tokens": num_tokens,
        "sampling": SamplingParams(),
        "choice": 0,
        "arrived_at": 0.0,
        "block_size": 2,
    }
    return Sequence(**defaults | fields)
