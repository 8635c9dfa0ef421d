"""What one core of this machine can do, measured: bytes read and operations a second.

Each is the best of several ways, as a limit must not depend on one of them being slow: plain reads
by torch, products by torch in both kinds of numbers, and the model's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from common.engine.model import Multiplies

_READ_BYTES = 256 << 20  # far more than caches hold
_SIDE = 1024  # of the square matrices that are multiplied
_MANY_ROWS = 512


@dataclass(frozen=True)
class Limits:
    """Of one core; `read_by` and `multiplied_by` name the fastest way."""

    bytes_per_s: float
    operations_per_s: float
    read_by: str
    multiplied_by: str

    def least_s(self, num_bytes: float, num_operations: float) -> float:
        """No work that reads and computes so much takes less."""
        return max(num_bytes / self.bytes_per_s, num_operations / self.operations_per_s)

    def text(self) -> str:
        """For people."""
        return (
            f"limits of one core: {self.bytes_per_s / 1e9:.1f} GB/s read ({self.read_by}), "
            f"{self.operations_per_s / 1e9:.0f} GFLOP/s ({self.multiplied_by})"
        )


def limit_parts(linears: Iterable[Multiplies]) -> dict[str, Callable[[], object]]:
    """The ways, to be timed in the rounds of what is held against them. See `limits_of`."""
    numbers = torch.ones(_READ_BYTES // 4)
    parts: dict[str, Callable[[], object]] = {
        "read: sum": numbers.sum,
        "read: dot": lambda: torch.dot(numbers, numbers),
        "read: max": numbers.max,
    }
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(_SIDE, _SIDE, dtype=dtype)
        parts[f"multiply: {dtype}".replace("torch.", "")] = partial(torch.mm, square, square)
    for shape, (linear, *_) in by_shape(linears).items():
        parts[f"multiply: {shape}"] = products([linear], _MANY_ROWS)
    return parts


def limits_of(seconds: Mapping[str, list[float]], linears: Iterable[Multiplies]) -> Limits:
    """From the seconds of `limit_parts` in all rounds: the best of the ways' medians."""
    operations = {
        f"multiply: {shape}": product_operations(same[:1], _MANY_ROWS)
        for shape, same in by_shape(linears).items()
    }
    found: dict[str, dict[str, float]] = {"read": {}, "multiply": {}}
    for name, times in seconds.items():
        kind, _, way = name.partition(": ")
        if kind not in found:
            continue
        amount = _READ_BYTES if kind == "read" else operations.get(name, 2.0 * _SIDE**3)
        found[kind][way] = amount / float(torch.tensor(times).median())
    (read_by, read), (multiplied_by, multiplied) = (
        max(ways.items(), key=lambda way: way[1]) for ways in found.values()
    )
    return Limits(read, multiplied, read_by, multiplied_by)


def by_shape(linears: Iterable[Multiplies]) -> dict[str, list[Multiplies]]:
    """Those of each shape, such as 576 x 1536, in the order in which they come."""
    shapes: dict[str, list[Multiplies]] = {}
    for each in linears:
        shapes.setdefault(f"{each.in_features} x {each.out_features}", []).append(each)
    return shapes


def products(linears: Sequence[Multiplies], rows: int) -> Callable[[], None]:
    """One product of so many rows with each of them, and nothing else."""
    inputs = {
        linear.in_features: torch.randn(rows, linear.in_features).to(linear.dtype)
        for linear in linears
    }

    def multiply() -> None:
        with torch.inference_mode():
            for linear in linears:
                linear(inputs[linear.in_features])

    return multiply


def weight_bytes(linears: Iterable[Multiplies]) -> int:
    """Bytes of their weights."""
    return sum(each.in_features * each.out_features * each.dtype.itemsize for each in linears)


def product_operations(linears: Iterable[Multiplies], rows: int) -> float:
    """Multiplications and additions of a product of so many rows with each."""
    return 2.0 * rows * sum(each.in_features * each.out_features for each in linears)
