"""What keeps the bits of a row independent of the rows beside it, in batch-invariant mode.

A library picks its kernel by shape, so the bits of a product's row can depend on how many rows
there are: products run only at row counts that were tried at load and found to agree. And exp may
differ in its last bit between a loop's SIMD body and its scalar tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.config import ModelError
from common.engine.linear import Linear

# Close together where decode batches are, so that padding stays small; the first is
# linear.MIN_ROWS.
ROW_COUNTS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)
_REFERENCE = 16
# torch splits element-wise work over threads above this many elements (at::internal::GRAIN_SIZE),
# and its loops take at most so many at once.
_SERIAL_ELEMENTS = 32768
_LOOP_ELEMENTS = 64


def agreeing_row_counts(linears: Iterable[Linear]) -> tuple[int, ...]:
    """Those of ROW_COUNTS that agree bit for bit with products of 16 rows on one thread, for all
    `linears`; so processes that differ in their number of threads agree too.

    Kernels are chosen by shape, type and threads and never by value, so random rows will do. Costs
    about two products of 256 rows for each distinct shape. Raises ModelError where none agree.
    """
    counts: list[int] = list(ROW_COUNTS)
    tried: set[tuple[int, int, bool]] = set()
    for linear in linears:
        kind = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind not in tried:
            tried.add(kind)
            counts = _agreeing(linear, counts)
    if not counts:
        raise ModelError("batch_invariant: no products agree with one thread's; use threads 1")
    return tuple(counts)


def _agreeing(linear: Linear, counts: Sequence[int]) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(ROW_COUNTS), linear.in_features, generator=generator)
    rows = rows.to(linear.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = torch.cat([linear(part) for part in torch.split(rows, _REFERENCE)])
    torch.set_num_threads(threads)
    # Counts that divide nothing evenly are tried at the start and at the end of the rows.
    return [
        count
        for count in counts
        if torch.equal(linear(rows[:count]), expected[:count])
        and torch.equal(linear(rows[-count:]), expected[-count:])
    ]


def tile_rows(count: int, allowed: Sequence[int]) -> list[int]:
    """Tiles of allowed (ascending) sizes that together hold at least `count` rows."""
    tiles = [allowed[-1]] * (count // allowed[-1])
    rest = count % allowed[-1]
    if rest:
        tiles.append(next(size for size in allowed if size >= rest))
    return tiles


def in_fixed_parts(function: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """`function`, which works in place and element by element, on `x` or on a copy of it.

    The bits of an element do not depend on where it lies: it is laid out in one run and handed over
    in parts that no thread splits and no tail cuts.
    """
    run = x.reshape(-1)
    padding = -len(run) % _LOOP_ELEMENTS
    if padding:
        run = functional.pad(run, (0, padding))
    for part in torch.split(run, _SERIAL_ELEMENTS):
        function(part)
    return run[: x.numel()].view(x.shape)
