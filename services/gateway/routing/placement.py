"""Where a request is served: the store by its first block, prefill and decode worker by what each
pair is expected to take. Pure.

For each pair the first token is expected after what the worker has before it, the transfer of
cached blocks that it has no copy of, and the computing of the rest; each later one after a step of
the decode worker with this request in its batch. Of the pairs that meet the request's targets the
one is taken where its work and its wait for the first token are least in sum: work is spared, but
not by a line before one worker while another is idle. If none does, or it has no targets, it is the
one that serves it soonest and delays others least. A decode worker pairs with itself where it may
compute the prompt too: a short one, one for whose chunks the targets of those that run there leave
time (services/decode/pace.py), or one whose KV would take longer to move (break_even.py). A prefill
worker keeps what it has computed, and decodes it, where no decode worker has a place for it or
would meet its target per token. (Mooncake's Algorithm 1 chooses by the same three terms: Qin et
al., 2025.)
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from typing import Generic, TypeVar

from common.step_times import PACED_SHARE, attended
from services.gateway.routing.break_even import Move, expected_move
from services.gateway.routing.candidates import Candidate, Wanted
from services.gateway.routing.decision import MAX_ALTERNATIVES, BreakEven, Decision, Option
from services.gateway.routing.estimates import GUESSED_PROMPT_STEPS, GUESSED_TOKEN_STEPS, resolved

_MOST_OF_A_ROLE = 8  # workers whose pairs are looked at, the best by themselves
_EQUAL = 0.05  # two that differ by less take turns: predictions are no better
LEAST_SHARE = 0.05  # of a step's time, that prompts get even where targets leave none
_SOONER = 0.9  # of a decode worker's step, that one at prefill is shorter than
_PROMPTS_SHARE = 1 / 4  # that prefill leaves prompts without a target beside what it decodes
_SESSION_BONUS = 0.1  # of the time, for each worker that the session knows


C = TypeVar("C", bound=Candidate)
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Choice(Generic[C]):
    """The pair to serve a request; `prefill` is `decode` where that one does both."""

    prefill: C
    decode: C
    decision: Decision


@dataclass(frozen=True, slots=True)
class _FirstToken:
    """What a first token is expected to wait for at one worker."""

    queue_s: float
    transfer_s: float
    compute_s: float
    work_s: float  # of it, without what lies between its steps
    num_steps: int  # in which it is computed
    delays_s: float  # of prompts behind it, in sum

    @property
    def total_s(self) -> float:
        return self.queue_s + self.transfer_s + self.compute_s


@dataclass(slots=True)
class _Pair(Generic[C]):
    """`move` is what the pair has to move or, where decode computes the prompt, what is spared."""

    prefill: C
    decode: C
    first: _FirstToken
    tpot_s: float
    move: Move
    meets: bool
    rank: tuple[float, ...]  # the least is the best


def choose_shard(first_block: Sequence[int], shards: Sequence[int]) -> int:
    """The store shard for prompts that begin with this block: all of them meet there.

    Rendezvous hashing (Thaler and Ravishankar, 1998): when a shard is lost only its own prompts go
    elsewhere, and they return with it. Every gateway chooses alike.
    """
    tokens = array("I", first_block).tobytes()

    def weight(shard: int) -> bytes:
        return hashlib.blake2b(tokens, digest_size=8, salt=shard.to_bytes(8, "little")).digest()

    return max(shards, key=weight)


def choose(
    wanted: Wanted,
    prefills: Sequence[C],
    decodes: Sequence[C],
    now: float,
    *,
    max_local_tokens: int | None,
) -> Choice[C]:
    """The best pair of workers. A decode worker may compute up to `max_local_tokens` of a prompt
    itself and, unless those are 0, any number where targets pace it or moving them does not pay;
    with None it computes any, as it does where there are no prefill workers. Those of `prefills`
    that `may_keep` a request pair with themselves where decode workers are at their limit."""
    judge = _Judge(wanted, prefills, decodes, now)
    pairs = list(judge.pairs(max_local_tokens))
    best, *others = nsmallest(MAX_ALTERNATIVES + 1, pairs, key=lambda pair: pair.rank)
    decision = Decision(
        chosen=_option(wanted, best),
        reason=_reason(wanted, best, pairs),
        num_considered=len(pairs),
        alternatives=tuple(_option(wanted, pair) for pair in others),
    )
    return Choice(best.prefill, best.decode, decision)


class _Judge(Generic[C]):
    """What each pair is expected to take for one request."""

    def __init__(
        self, wanted: Wanted, prefills: Sequence[C], decodes: Sequence[C], now: float
    ) -> None:
        self._wanted = wanted
        self._now = now
        self._ttft_limit_s = wanted.ttft_target_s or math.inf
        self._tpot_limit_s = wanted.tpot_target_s or math.inf
        self._prompt_steps = [each.prompt_steps for each in (*prefills, *decodes)]
        self._token_steps = [each.token_steps for each in decodes]
        firsts = [(each, self._first_at_prefill(each)) for each in prefills]
        laters = [(each, self._tpot_s(each)) for each in decodes]
        self._prefills = _best(firsts, lambda pair: pair[1].total_s)
        self._decodes = _best(laters, lambda pair: (pair[0].is_full, pair[1]))

    def pairs(self, max_local_tokens: int | None) -> Iterator[_Pair[C]]:
        """All that are worth considering; at least one."""
        num_tokens = self._wanted.num_uncached
        soonest_s = min((first.total_s for _, first in self._prefills), default=math.inf)
        for decode, tpot_s in self._decodes:
            local = self._first_token(decode)
            if max_local_tokens is None:
                yield self._pair(decode, decode, local, tpot_s, Move())
                continue
            local = _between_tokens(decode, local, tpot_s, self._running_s(decode), num_tokens)
            ready_s, spared = math.inf, Move()
            for prefill, first in self._prefills:
                move = expected_move(
                    prefill,
                    decode,
                    self._wanted,
                    compute_s=first.compute_s,
                    num_chunks=first.num_steps,
                    local_s=local.transfer_s + local.compute_s,
                )
                if first.total_s + move.residue_s < ready_s:
                    ready_s, spared = first.total_s + move.residue_s, move
                yield self._pair(prefill, decode, first, tpot_s, move)
            if spared.pays:
                may_be_local = num_tokens <= max_local_tokens or _is_paced(decode, self._wanted)
                ready_s = soonest_s if may_be_local else 0.0
            if max_local_tokens and _may(decode, local, tpot_s, ready_s):
                yield self._pair(decode, decode, local, tpot_s, spared)
        if all(each.is_full or tpot_s > self._tpot_limit_s for each, tpot_s in self._decodes):
            yield from self._kept()

    def _kept(self) -> Iterator[_Pair[C]]:
        """Prefill workers that may decode this one themselves: where their next prompts do not have
        to wait for it for long, or where it has its tokens sooner than at any decode worker, as no
        target is met at those any more."""
        soonest_s = min(tpot_s for _, tpot_s in self._decodes)
        for prefill, first in self._prefills:
            tpot_s = self._tpot_s(prefill)
            if not prefill.may_keep or prefill.is_full:
                continue
            if tpot_s < _SOONER * soonest_s or self._leaves_time(prefill, tpot_s):
                yield self._pair(prefill, prefill, first, tpot_s, Move())

    def _leaves_time(self, prefill: C, tpot_s: float) -> bool:
        """Whether prompts like this one still come in time at a prefill worker whose steps take
        this for what it decodes."""
        limit_s = min(self._tpot_limit_s, prefill.tpot_limit_s)
        if not self._wanted.ttft_target_s:
            return tpot_s <= (1 - _PROMPTS_SHARE) * PACED_SHARE * limit_s
        then = replace(prefill, num_sequences=prefill.num_sequences + 1, tpot_limit_s=limit_s)
        first = self._first_token(prefill)
        first = _between_tokens(then, first, tpot_s, tpot_s, self._wanted.num_uncached)
        return tpot_s <= PACED_SHARE * limit_s and first.total_s <= self._ttft_limit_s

    def _first_at_prefill(self, prefill: C) -> _FirstToken:
        first = self._first_token(prefill)
        if not prefill.num_sequences:
            return first
        running_s = self._running_s(prefill)
        return _between_tokens(prefill, first, running_s, running_s, self._wanted.num_uncached)

    def _first_token(self, worker: C) -> _FirstToken:
        wanted = self._wanted
        times = resolved(worker.prompt_steps, self._prompt_steps, GUESSED_PROMPT_STEPS)
        num_tokens = wanted.num_uncached
        compute_s = times.prompt_s(num_tokens, attended(num_tokens, wanted.num_cached))
        ahead_s, num_behind = worker.backlog.ahead_s(times, num_tokens, compute_s, self._now)
        return _FirstToken(
            queue_s=ahead_s + worker.others_s,
            transfer_s=worker.transfer_s(wanted.num_cached, wanted.token_bytes),
            compute_s=compute_s,
            work_s=compute_s,
            num_steps=times.num_steps(num_tokens),
            delays_s=num_behind * compute_s,
        )

    def _tpot_s(self, decode: C) -> float:
        num_sequences = min(decode.num_sequences + 1, decode.max_num_seqs)
        context = decode.num_context_tokens + self._wanted.num_tokens
        return self._step_s(decode, num_sequences, context)

    def _running_s(self, decode: C) -> float:
        """A step of those that run there now."""
        num_running = decode.num_sequences - decode.num_awaited
        if num_running <= 0:
            return 0.0
        share = num_running / decode.num_sequences
        return self._step_s(decode, num_running, share * decode.num_context_tokens)

    def _step_s(self, decode: C, num_sequences: int, context: float) -> float:
        times = resolved(decode.token_steps, self._token_steps, GUESSED_TOKEN_STEPS)
        return times.step_s(num_sequences, context)

    def _pair(
        self, prefill: C, decode: C, first: _FirstToken, tpot_s: float, move: Move
    ) -> _Pair[C]:
        wanted = self._wanted
        ttft_s, answer_s = first.total_s, tpot_s * wanted.num_answer_tokens
        moved = Move() if prefill is decode else move
        meets = (
            not decode.is_full
            and wanted.waited_s + ttft_s <= self._ttft_limit_s
            and tpot_s <= self._tpot_limit_s
        )
        if meets and wanted.ttft_target_s:
            work_s = first.transfer_s + first.work_s + moved.transfer_s + answer_s
            score_s = work_s + ttft_s
        else:  # decode fetches what is computed while the rest is
            late_s = max(0.0, moved.transfer_s - first.compute_s)
            score_s = ttft_s + late_s + answer_s + first.delays_s
        if wanted.session:
            score_s *= 1 - _SESSION_BONUS * len({prefill.name, decode.name} & set(wanted.session))
        turn = (prefill.num_placed, decode.num_placed)
        rank = (decode.crowding, not meets, _rough(score_s), *turn)
        return _Pair(prefill, decode, first, tpot_s, move, meets, rank)


def _between_tokens(
    decode: C, first: _FirstToken, tpot_s: float, running_s: float, num_tokens: int
) -> _FirstToken:
    """A prompt that is computed in the steps that give others their tokens: it waits for the
    running one to end. Where targets limit steps it gets what is left of each, and so do those
    before it."""
    paced_s = num_tokens * decode.paced_token_s
    if not decode.num_sequences:
        compute_s = max(first.compute_s, paced_s)
        return replace(first, compute_s=compute_s, work_s=compute_s)
    if math.isinf(decode.tpot_limit_s):
        return replace(
            first,
            queue_s=first.queue_s + tpot_s / 2,
            compute_s=first.compute_s + first.num_steps * tpot_s,
        )
    step_s = PACED_SHARE * decode.tpot_limit_s
    share = max(LEAST_SHARE, 1 - running_s / step_s)
    work_s = paced_s or first.work_s
    return replace(
        first,
        queue_s=first.queue_s / share + step_s / 2,
        compute_s=work_s / share,
        work_s=work_s,
    )


def _is_paced(decode: Candidate, wanted: Wanted) -> bool:
    """Whether a long prompt there keeps nobody waiting for longer than targets allow."""
    if not decode.num_sequences:
        return wanted.tpot_target_s > 0
    return math.isfinite(decode.tpot_limit_s)


def _may(decode: C, local: _FirstToken, tpot_s: float, ready_s: float) -> bool:
    """Whether the prompt is computed sooner than in `ready_s`, when its first token would come from
    a prefill worker or, where moving does not pay, its KV be here, and those that run here have
    targets, to which its chunks keep, or lose less by it than the request gains."""
    gain_s = ready_s - local.total_s
    if gain_s <= _EQUAL * ready_s or decode.is_full:
        return False
    if decode.num_sequences == 0 or math.isfinite(decode.tpot_limit_s):
        return True
    return decode.num_sequences * (local.compute_s - local.num_steps * tpot_s) <= gain_s


def _option(wanted: Wanted, pair: _Pair[C]) -> Option:
    return Option(
        prefill=pair.prefill.name,
        decode=pair.decode.name,
        line_ms=wanted.waited_s * 1000,
        queue_ms=pair.first.queue_s * 1000,
        transfer_ms=pair.first.transfer_s * 1000,
        compute_ms=pair.first.compute_s * 1000,
        tpot_ms=pair.tpot_s * 1000,
        num_cached_tokens=wanted.num_cached,
        meets_targets=pair.meets,
        break_even=_break_even(pair.move),
    )


def _break_even(move: Move) -> BreakEven | None:
    if not move.num_bytes:
        return None
    return BreakEven(
        num_bytes=move.num_bytes,
        bytes_per_s=move.bytes_per_s,
        transfer_ms=move.transfer_s * 1000,
        residue_ms=move.residue_s * 1000,
        local_ms=move.local_s * 1000,
        pays=move.pays,
    )


def _best(workers: Sequence[W], key: Callable[[W], float | tuple[bool, float]]) -> Sequence[W]:
    return nsmallest(_MOST_OF_A_ROLE, workers, key=key)


def _rough(seconds: float) -> int:
    """Equal for two times that differ by little."""
    return round(math.log(max(seconds, 1e-6)) / _EQUAL)


def _reason(wanted: Wanted, best: _Pair[C], pairs: Sequence[_Pair[C]]) -> str:
    """Why this pair was chosen, for people."""
    others = [
        pair.first.total_s + (0.0 if best.move.pays else pair.move.residue_s)
        for pair in pairs
        if pair.prefill is not pair.decode and pair.decode is best.decode
    ]
    if best.decode.is_full:
        why = "every decode worker is full"
    elif best.prefill is best.decode and best.decode.may_keep:
        why = "no decode worker has a place and meets the target per token: it stays at prefill"
    elif best.prefill is best.decode and others:
        gain_ms = (min(others) - best.first.total_s) * 1000
        why = (
            f"it computes the {wanted.num_uncached} uncached tokens itself, {gain_ms:.1f} ms sooner"
        )
        if not best.move.pays:
            why += (
                f": to move {best.move.num_bytes:,} bytes at {best.move.bytes_per_s:,.0f} a second "
                f"takes longer ({best.move.transfer_s * 1000:.1f} ms) than to compute them"
            )
    elif len(pairs) == 1:
        why = "there is no other"
    elif not (wanted.ttft_target_s or wanted.tpot_target_s):
        why = "it is expected to serve the request soonest"
    elif best.meets:
        why = "it meets the targets, with the least work and waiting"
    else:
        why = "none meets the targets, and it comes closest"
    if {best.prefill.name, best.decode.name} & set(wanted.session):
        why += "; its session was there before"
    return why
