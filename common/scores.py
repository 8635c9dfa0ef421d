"""How likely the model found the tokens of a prompt, as bytes: from the engine to the gateway.

One row for each token but the first: that token, then the likeliest at its place, most likely
first, each as its id and its log-probability. All rows of a prompt are equally long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_SCORE = struct.Struct("<Id")

MAX_SCORES = 256 * 1024  # of one prompt: a message of 3 MiB, and lists that a gateway can bear
MAX_SCORES_BYTES = MAX_SCORES * _SCORE.size


def pack_scores(row: Iterable[tuple[int, float]]) -> bytes:
    """One row."""
    return b"".join(_SCORE.pack(token_id, logprob) for token_id, logprob in row)


def unpack_scores(raw: bytes, num_rows: int) -> list[list[tuple[int, float]]]:
    """All rows. Raises ValueError unless they are so many, equally long and of one token at
    least."""
    width, rest = divmod(len(raw), num_rows * _SCORE.size)
    if rest or not width:
        raise ValueError(f"{len(raw)} bytes are not {num_rows} rows of scores")
    scores = list(_SCORE.iter_unpack(raw))
    return [scores[start : start + width] for start in range(0, len(scores), width)]
