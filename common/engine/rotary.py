"""Rotary position embedding: the angles, as tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.engine.config import RopeConfig

_ROWS = 64  # few enough that torch splits them over no threads


def rotary_tables(
    rope: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [num_positions, head_dim], computed in fp32 and cast to `dtype`.

    Made in parts of one fixed shape, so that an entry's bits depend on its position alone.
    """
    frequencies = _frequencies(rope, head_dim)
    cos = torch.empty(num_positions, head_dim, dtype=dtype)
    sin = torch.empty(num_positions, head_dim, dtype=dtype)
    for start in range(0, num_positions, _ROWS):
        positions = torch.arange(start, start + _ROWS, dtype=torch.float32)
        angles = positions[:, None] * frequencies
        stop = min(start + _ROWS, num_positions)
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            table[start:stop] = values.repeat(1, 2)[: stop - start]
    return cos, sin


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions, [head_dim / 2] in fp32 (RoFormer, 3.4.2).

    linear divides all by the factor; llama3 divides the slow ones and blends those in between, as
    transformers' modeling_rope_utils does.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: Tensor = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    longest = rope.original_max_position / low
    shortest = rope.original_max_position / high
    slowed = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (rope.original_max_position / wavelengths - low) / (high - low)
    blended = (1 - smooth) * slowed / rope.factor + smooth * slowed
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, slowed)
