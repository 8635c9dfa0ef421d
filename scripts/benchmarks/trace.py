"""The Mooncake conversation trace, and its replay through the store's own block pool.

Each request finds its leading run of blocks, pins it, is granted the rest, commits and reads all of
them, and leaves before the next one comes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from services.kvstore.blocks import BlockName, BlockPool
from services.kvstore.eviction import Order

TRACE = Path(__file__).parents[2] / "tests" / "data" / "mooncake_conversation.json.gz"
_NUM_FLOOD_BLOCKS = 24  # of a prompt: the trace's mean
_FLOOD_KEYS = 1 << 40  # the trace's are far below


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt: the keys of its blocks, and whose it is."""

    keys: Sequence[int]
    tenant: bytes = b"trace"


def conversation_trace(path: Path = TRACE) -> list[Request]:
    """The 12,031 prompts in order."""
    columns = json.loads(gzip.decompress(path.read_bytes()))
    return [Request(list(_numbers(runs))) for runs in columns["hash_id_runs"]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came: when, the keys of its prompt's blocks, and how many tokens each way."""

    at: float
    keys: Sequence[int]
    num_tokens: int
    num_outputs: int


def arrivals(path: Path = TRACE) -> list[Arrival]:
    """The 12,031 requests in order, with their times in seconds."""
    columns = json.loads(gzip.decompress(path.read_bytes()))
    names = ("timestamp_ms", "hash_id_runs", "input_length", "output_length")
    rows = zip(*(columns[name] for name in names), strict=True)
    return [Arrival(ms / 1000, list(_numbers(runs)), *lengths) for ms, runs, *lengths in rows]


def _numbers(runs: list[int]) -> Iterator[int]:
    for first, count in zip(runs[::2], runs[1::2], strict=True):
        yield from range(first, first + count)


def flooded(
    requests: Iterable[Request], times: int, tenant: bytes = b"flood", *, first: int = 0
) -> Iterator[Request]:
    """After each request `times` prompts that never come again; `first`: of their blocks."""
    first += _FLOOD_KEYS
    for request in requests:
        yield request
        for _ in range(times):
            yield Request(range(first, first + _NUM_FLOOD_BLOCKS), tenant)
            first += _NUM_FLOOD_BLOCKS


def hit_rate(num_blocks: int, order: Order, requests: Iterable[Request]) -> float:
    """Blocks found / blocks asked for, of all requests but the flood."""
    pool = BlockPool(num_blocks, order)
    num_found = num_asked = 0
    for request in requests:
        keys = [b"%d" % key for key in request.keys]
        found = pool.lookup(keys)
        pool.pin(found)
        granted = pool.grant(len(keys) - len(found), "writer")
        names = [BlockName(*pair, request.tenant) for pair in _with_parents(keys)]
        for block, name in zip(granted, names[len(found) :], strict=True):
            pool.commit(block, name)
        pool.unpin(found + granted)
        if request.keys[0] < _FLOOD_KEYS:
            num_found += len(found)
            num_asked += len(keys)
    return num_found / num_asked


def _with_parents(keys: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for parent, key in pairwise([b"", *keys]):
        yield key, parent
