"""From logits to tokens. What is drawn for a row depends on that row, its seed and its position."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from common.engine.grammar import Grammars
from common.engine.masks import Float32Array, forbid, forbid_ends, forbids
from common.engine.work import Sampled, Work
from common.scores import pack_scores
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams

_GREEDY_BELOW = 1e-5  # of temperatures, as in vLLM: dividing by less leaves the range of fp32
_DRAW_BLOCK = 256  # weights summed at once; a running sum over all of them takes ten times as long


class NumericalError(Exception):
    """The model gave logits that are not numbers: damaged weights, or damaged KV."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits, a pure function of its arguments.

    Counter-based randomness (Salmon et al., 2011) with BLAKE2b as the generator: no state, so a
    token is drawn alike wherever and however often its position is computed.
    """
    counter = struct.pack("<QQQ", seed % 2**64, choice, position)
    bits = int.from_bytes(blake2b(counter, digest_size=8).digest(), "little") >> 11
    return bits / 2**53


def sample(
    logits: Float32Array,
    works: Sequence[Work],
    eos: Sequence[int],
    grammars: Grammars | None = None,
) -> list[Sampled | None]:
    """Draw the next token of each row of logits [rows, vocab_size]; row i belongs to works[i].

    `eos` are the ids that end a sequence, masked while a row has fewer than min_tokens outputs.
    `grammars` is there if a work has one. None for a work that leaves no token to draw, or whose
    grammar cannot be followed: its `error` says so. Raises NumericalError where a row's largest
    logit is NaN or infinite.
    """
    best = logits.argmax(axis=1).tolist()  # the first NaN, where there is one
    check_finite(row[token] for row, token in zip(logits, best, strict=True))
    return [
        Sampled(token, 0.0) if is_plain(work) else _try_row(row, work, eos, grammars)
        for row, work, token in zip(logits, works, best, strict=True)
    ]


def check_finite(largest: Iterable[float]) -> None:
    """Raises NumericalError unless each row's largest logit is a number."""
    if not all(map(math.isfinite, largest)):
        raise NumericalError("the model's logits are not finite: check the weights and the KV")


def _num_outputs(work: Work) -> int:
    return work.end - work.num_prompt_tokens


def is_plain(work: Work) -> bool:
    """Greedy, with nothing that would change the largest logit or that needs reporting."""
    params = work.sampling
    return _is_greedy(params) and params.logprobs is None and not _changes_logits(work)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def _changes_logits(work: Work) -> bool:
    params = work.sampling
    return (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or bool(params.logit_bias)
        or forbids(params)
        or _num_outputs(work) < params.min_tokens
    )


def _try_row(
    row: Float32Array, work: Work, eos: Sequence[int], grammars: Grammars | None
) -> Sampled | None:
    try:
        return _sample_row(row, work, eos, grammars)
    except InvalidRequestError as error:
        work.error = error
        return None


def _sample_row(
    row: Float32Array, work: Work, eos: Sequence[int], grammars: Grammars | None
) -> Sampled:
    params = work.sampling
    adjusted = _adjust(row.copy(), work, eos, grammars) if _changes_logits(work) else row
    if _is_greedy(params):
        token = int(adjusted.argmax())
    else:
        noise = uniform(params.seed or 0, work.choice, work.end)
        token = _draw(probabilities(adjusted, params), noise)
    if params.logprobs is None:
        return Sampled(token, 0.0)
    return _with_logprobs(row, token, params.logprobs)


def _adjust(
    logits: Float32Array, work: Work, eos: Sequence[int], grammars: Grammars | None = None
) -> Float32Array:
    """Mask, bias and penalise in place, in vLLM's order (docs.vllm.ai, vllm.v1.sample.sampler,
    v0.22.1): the grammar before all, then allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition, frequency, presence.

    Repetition (Keskar et al., CTRL, 4.1) counts prompt and output, the other two the output alone.
    """
    params = work.sampling
    if forbids(params):
        assert grammars is not None or not params.grammar
        forbid(logits, work, grammars.allowed(work, len(logits)) if grammars else None)
    if _num_outputs(work) < params.min_tokens:
        forbid_ends(logits, (*eos, *params.stop_token_ids))
    if params.logit_bias:
        _bias(logits, params.logit_bias)
    tokens = np.asarray(work.tokens, dtype=np.int64)
    if params.repetition_penalty != 1:
        seen = np.unique(tokens)
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        seen, counts = np.unique(tokens[work.num_prompt_tokens :], return_counts=True)
        penalties = params.frequency_penalty * counts + params.presence_penalty
        logits[seen] -= penalties.astype(np.float32)
    return logits


def _bias(logits: Float32Array, biases: Mapping[int, float]) -> None:
    known = {token: bias for token, bias in biases.items() if 0 <= token < len(logits)}
    logits[list(known)] += np.fromiter(known.values(), dtype=np.float32)


def probabilities(logits: Float32Array, params: SamplingParams) -> Float32Array:
    """Unnormalised probabilities [vocab_size] after temperature, min_p, top_k and top_p.

    In vLLM's order: each filter sees what the one before it left. The likeliest token has 1.0 and
    always stays; of tokens that tie at a boundary none is dropped. top_p above: nucleus sampling
    (Holtzman et al., 2020).
    """
    scaled = (logits - logits.max()) / np.float32(params.temperature)
    weights: Float32Array = np.exp(scaled)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    if 0 < params.top_k < len(weights):
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0
    if params.top_p < 1:
        weights[weights < _nucleus_boundary(weights, params.top_p)] = 0
    return weights


def _nucleus_boundary(weights: Float32Array, top_p: float) -> np.float32:
    """The smallest weight among the fewest tokens that hold `top_p` of the mass.

    Only weights that may be among them are sorted: all those below (1 - top_p) / vocab_size of the
    mass hold less than 1 - top_p of it together.
    """
    total = weights.sum(dtype=np.float64)
    falling = np.sort(weights[weights >= (1 - top_p) * total / len(weights)])[::-1]
    place = np.searchsorted(np.cumsum(falling, dtype=np.float64), top_p * total)
    boundary: np.float32 = falling[min(int(place), len(falling) - 1)]
    return boundary


def _draw(weights: Float32Array, noise: float) -> int:
    """Inverse of the cumulative distribution in vocabulary order, summed in float64.

    Block sums say in which block the token lies, a running sum where in it.
    """
    starts = np.arange(0, len(weights), _DRAW_BLOCK)
    mass = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = noise * mass[-1]
    block = int(np.searchsorted(mass, target, side="right"))
    begin, end = block * _DRAW_BLOCK, min((block + 1) * _DRAW_BLOCK, len(weights))
    before = mass[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[begin:end], dtype=np.float64)
    token = begin + int(np.searchsorted(inside, target, side="right"))
    # Both sums round: past the block's end, or past the last block, the last token of any weight.
    return token if token < end else int(np.flatnonzero(weights[:end])[-1])


def score(rows: Float32Array, tokens: Sequence[int], count: int) -> bytes:
    """How likely tokens[i] is by the logits rows[i], and the `count` likeliest there: rows of
    common/scores.py. Raises NumericalError as `sample` does."""
    check_finite(rows.max(axis=1))
    scored = (_with_logprobs(row, token, count) for row, token in zip(rows, tokens, strict=True))
    return b"".join(
        pack_scores([(each.token_id, each.logprob), *each.top_logprobs]) for each in scored
    )


def _with_logprobs(row: Float32Array, token: int, count: int) -> Sampled:
    """`token` with the log-probabilities of the raw distribution; ties ordered by token id."""
    top = float(row.max())
    log_total = top + float(np.log(np.exp(row - row.max()).sum(dtype=np.float64)))
    ranked: list[tuple[int, float]] = []
    if count:
        boundary = np.partition(row, -count)[-count] if count < len(row) else -np.inf
        candidates = np.flatnonzero(row >= boundary)
        order = candidates[np.argsort(-row[candidates], kind="stable")][:count]
        ranked = [(int(index), float(row[index]) - log_total) for index in order]
    return Sampled(token, float(row[token]) - log_total, tuple(ranked))
