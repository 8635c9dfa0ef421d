"""When the requests of a load come, and what each asks for. Plans are pure; prompts are chance."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TRACE = "trace"
_TRACE_FILE = Path(__file__).parents[2] / "tests" / "data" / "azure_2023_conv.json.gz"
# What a small machine serves: longer ones of the trace are cut.
_MOST_PROMPT, _MOST_OUTPUT = 2048, 256
FIRST_TOKEN = 5  # below are special tokens


class Planned(NamedTuple):
    """One request: seconds after the load's begin, and tokens each way."""

    at: float
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of every request; the first `shared` of the prompt are the same in all of a load."""

    name: str
    prompt: int = 0
    output: int = 0
    shared: int = 0


def mix_of(name: str) -> Mix:
    """The mix of that name: trace, PROMPT/OUTPUT such as 512/64, or PROMPT/OUTPUT/SHARED.

    Raises ValueError for another name, and for numbers that do not fit together.
    """
    if name == TRACE:
        return Mix(TRACE)
    numbers = name.split("/")
    if len(numbers) not in (2, 3) or not all(each.isdecimal() for each in numbers):
        raise ValueError(f"mix is {name!r}: it must be trace, such as 512/64, or 512/64/384")
    mix = Mix(name, *map(int, numbers))
    if not 0 <= mix.shared < mix.prompt or mix.output < 1:
        raise ValueError(f"mix is {name!r}: it needs an output, and prompts longer than is shared")
    return mix


def plan(mix: Mix, count: int, rate: float, seed: int) -> list[Planned]:
    """`count` requests, `rate` a second on average; 0: all at the same moment.

    Moments are random (Poisson) or, with a trace, its own on another scale. With one seed they have
    the same pattern at every rate, so that loads of two servers or rates can be compared.
    """
    rng = random.Random(seed)  # noqa: S311 - a load
    if mix.name == TRACE:
        rows = _trace()
        first = rng.randrange(len(rows) - count)
        return replayed(rows[first : first + count], rate)
    at, planned = 0.0, []
    for _ in range(count):
        at += rng.expovariate(1.0) / rate if rate else 0.0
        planned.append(Planned(at, mix.prompt, mix.output))
    return planned


def replayed(rows: Sequence[Planned], rate: float) -> list[Planned]:
    """These requests at `rate` a second on average; 0: all at the same moment."""
    begun, span = rows[0].at, rows[-1].at - rows[0].at
    scale = len(rows) / (rate * span) if rate and span else 0.0
    return [
        Planned(
            (row.at - begun) * scale,
            min(row.num_prompt, _MOST_PROMPT),
            min(row.num_output, _MOST_OUTPUT),
        )
        for row in rows
    ]


def _trace() -> list[Planned]:
    columns = json.loads(gzip.decompress(_TRACE_FILE.read_bytes()))
    names = ("timestamp_ms", "input_length", "output_length")
    rows = zip(*(columns[name] for name in names), strict=True)
    return [Planned(at_ms / 1000, *lengths) for at_ms, *lengths in rows]


def new_prompts(planned: Sequence[Planned], shared: int, vocab: int) -> list[list[int]]:
    """A prompt of random tokens for each, like none before it but for the `shared` first tokens."""
    rng = random.Random()  # noqa: S311 - a new seed each time
    tokens = range(FIRST_TOKEN, vocab)
    head = rng.choices(tokens, k=shared)
    return [head + rng.choices(tokens, k=each.num_prompt - shared) for each in planned]
