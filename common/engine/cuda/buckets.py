"""Decode steps filled up to a few sizes, each of which is captured once as a CUDA graph. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.engine.attention.base import Int32Array
from common.engine.cuda.residency import SPARE_BLOCK
from common.engine.work import Work

# Padding costs little where weights dominate; above, steps of 32 keep it below a seventh.
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """Arrays of a decode step, filled up with rows that leave no trace.

    rows [4, size] in int64: the token, its position, and the block and row that its KV goes to.
    tables [size * (1 + width)] in int32: the length of each sequence, and then its table of blocks.
    A row of padding is a sequence of one token in the spare block, which belongs to nobody.
    """

    rows: Int64Array
    tables: Int32Array


def batch_size(num_sequences: int) -> int:
    """The size to fill up to, for as many sequences as graphs are made for."""
    return next(size for size in BATCH_SIZES if size >= num_sequences)


def fits_a_graph(works: Sequence[Work]) -> bool:
    """Whether every sequence has one row, whose next token is wanted and nothing besides, and there
    are not too many."""
    return len(works) <= BATCH_SIZES[-1] and all(
        work.num_tokens == 1 and work.sample and work.prompt_logprobs is None for work in works
    )


def empty_step(size: int, width: int) -> PaddedStep:
    """Padding alone."""
    rows = np.zeros((4, size), dtype=np.int64)
    rows[2] = SPARE_BLOCK
    tables = np.full(size * (1 + width), SPARE_BLOCK, dtype=np.int32)
    tables[:size] = 1
    return PaddedStep(rows, tables)


def fill_up(
    rows: Sequence[Int64Array], lengths: Int32Array, tables: Int32Array, size: int, width: int
) -> PaddedStep:
    """A decode step of `size` sequences and tables of `width`, the first of them these: `rows` are
    the four of PaddedStep."""
    count, used = tables.shape
    step = empty_step(size, width)
    for padded, row in zip(step.rows, rows, strict=True):
        padded[:count] = row[:count]
    step.tables[:count] = lengths
    step.tables[size:].reshape(size, width)[:count, :used] = tables
    return step
