"""Where a request is served: the store by its first block, prefill and decode worker by least
expected wait over live load. Pure."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(slots=True)
class Candidate:
    """A worker as placement sees it.

    Counts are the larger of what the worker reported and what this gateway knows it has given it:
    reports are late, and other gateways use the worker too.
    """

    name: str
    num_sequences: int
    num_tokens_queued: int
    tokens_per_s: float
    max_num_seqs: int
    num_placed: int  # ever, by this gateway: turns among equals


C = TypeVar("C", bound=Candidate)


def choose_shard(first_block: Sequence[int], shards: Sequence[int]) -> int:
    """The store shard for prompts that begin with this block: all of them meet there.

    Rendezvous hashing (Thaler and Ravishankar, 1998): when a shard is lost only its own prompts go
    elsewhere, and they return with it. Every gateway chooses alike.
    """
    tokens = array("I", first_block).tobytes()

    def weight(shard: int) -> bytes:
        return hashlib.blake2b(tokens, digest_size=8, salt=shard.to_bytes(8, "little")).digest()

    return max(shards, key=weight)


def _prefill_wait_s(worker: Candidate, num_tokens: int, default_rate: float) -> float:
    rate = worker.tokens_per_s or default_rate
    return (worker.num_tokens_queued + num_tokens) / rate


def _default_rate(workers: Sequence[Candidate]) -> float:
    """What to expect of a worker that has not computed anything yet."""
    known = [worker.tokens_per_s for worker in workers if worker.tokens_per_s]
    return sum(known) / len(known) if known else 1.0


def choose_prefill(workers: Sequence[C], num_tokens: int) -> C:
    """The worker that would be done with the prompt first."""
    rate = _default_rate(workers)
    return min(
        workers, key=lambda worker: (_prefill_wait_s(worker, num_tokens, rate), worker.num_placed)
    )


def choose_decode(workers: Sequence[C]) -> C:
    """The worker with the largest share of its places free: its steps are the shortest."""
    return min(
        workers,
        key=lambda worker: (worker.num_sequences / worker.max_num_seqs, worker.num_placed),
    )


def choose_colocated(workers: Sequence[C], num_tokens: int) -> C:
    """The worker that would start to decode first; among equals the one with most places free."""
    rate = _default_rate(workers)
    return min(
        workers,
        key=lambda worker: (
            worker.num_sequences >= worker.max_num_seqs,
            _prefill_wait_s(worker, num_tokens, rate),
            worker.num_sequences / worker.max_num_seqs,
            worker.num_placed,
        ),
    )
