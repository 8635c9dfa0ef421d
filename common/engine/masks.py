"""Tokens that must not come next: their logits become -inf, in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.engine.grammar import BoolArray
from common.engine.work import Work
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams

Float32Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def forbids(params: SamplingParams) -> bool:
    """Whether the request forbids tokens for as long as it runs."""
    return bool(params.grammar or params.allowed_token_ids or params.bad_words)


def forbid(logits: Float32Array, work: Work, by_grammar: BoolArray | None) -> None:
    """Mask what the grammar, allowed_token_ids and bad_words leave out. Ids that the model does not
    have count for nothing.

    A bad word is looked for in the output alone, as in vLLM: what is forbidden is its last token,
    where the output ends with those before it. Raises InvalidRequestError when no token is left.
    """
    params = work.sampling
    if by_grammar is not None:
        logits[~by_grammar] = -np.inf
    if params.allowed_token_ids:
        allowed = _known(params.allowed_token_ids, logits)
        kept = logits[allowed]
        logits.fill(-np.inf)
        logits[allowed] = kept
    output = work.tokens[work.num_prompt_tokens : work.end]
    ends = [word[-1] for word in params.bad_words if _is_last_token_due(word, output)]
    logits[_known(ends, logits)] = -np.inf
    if not np.isfinite(logits.max()):
        raise InvalidRequestError(
            "no token may follow the output so far: grammar, allowed_token_ids and bad_words "
            "together leave none"
        )


def _is_last_token_due(word: Sequence[int], output: Sequence[int]) -> bool:
    before = word[:-1]
    return len(before) <= len(output) and all(
        mine == theirs for mine, theirs in zip(reversed(before), reversed(output), strict=False)
    )


def forbid_ends(logits: Float32Array, ends: Sequence[int]) -> None:
    """Mask the tokens that would end the sequence, unless no other is left."""
    known = _known(ends, logits)
    kept = logits[known]
    logits[known] = -np.inf
    if not np.isfinite(logits.max()):
        logits[known] = kept


def _known(
    token_ids: Sequence[int], logits: Float32Array
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    ids = np.asarray(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < len(logits))]
