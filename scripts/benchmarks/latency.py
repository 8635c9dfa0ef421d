"""How long the steps of a large model take that is not at hand: OPT-66B on 8 A100-80GB, as
DistServe's authors fitted them (tests/data/README.md).

A prompt of n tokens takes a + b n + c n², which they measured for prompts of up to 2,048 tokens; a
token phase takes a + b positions + c sequences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common.step_times import StepTimes

NAME = "OPT-66B on 8 A100-80GB (DistServe's fit)"
LONGEST_MEASURED = 2048  # tokens of a prompt, which OPT cannot exceed
# Llama-2-70B's: of OPT-66B, which shares no heads, it would be seven times as much.
TOKEN_BYTES = 80 * 2 * 8 * 128 * 2  # layers, key and value, heads, their size, bytes of a number
_FITS = Path(__file__).parents[2] / "tests" / "data" / "distserve_opt_66b_a100_tp8.json"


@dataclass(frozen=True, slots=True)
class Latency:
    """What steps take that compute prompts, and those that do not."""

    prompts: StepTimes
    tokens: StepTimes


def opt_66b(max_tokens: int) -> Latency:
    """The fits, for steps of up to `max_tokens`: n² is twice the positions that are attended to."""
    fits = json.loads(_FITS.read_text(encoding="utf-8"))
    base, token, square = fits["prefill"]
    decode_base, position, sequence = fits["decoding_smallbs"]
    return Latency(
        StepTimes(base_ms=base, token_ms=token, context_ms=2 * square, max_tokens=max_tokens),
        StepTimes(
            base_ms=decode_base, token_ms=sequence, context_ms=position, max_tokens=max_tokens
        ),
    )
