"""Weights as 8-bit integers by output channel, activations by row, keys and values by position and
head.

The method is that of Wu et al., "Integer Quantization for Deep Learning Inference: Principles and
Empirical Evaluation" (arXiv:2004.09602), for weights: symmetric, one scale for each output channel,
and the channel's largest magnitude at the end of the range. What a product multiplies with them
stays as it is, or each row of it is rounded in the same way as it comes. Sums stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZATIONS = ("none", "int8", "w8a8_int8")  # weights, or activations too
KV_CACHE_DTYPES = ("auto", "int8")
_LARGEST = 127
_ROWS_AT_ONCE = 1024  # the matrix of a large head in float32 would be larger than all else


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and float32 scales [out]; their product is `weight` [out, in], rounded.

    A channel that is not finite gets a scale that is not, so that its outputs show it.
    """
    parts = [_quantise(part) for part in torch.split(weight, _ROWS_AT_ONCE)]
    steps, scales = (torch.cat(same) for same in zip(*parts, strict=True))
    return steps, scales


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    steps = (wide / scales[:, None]).round_()
    return steps.nan_to_num_(0.0).to(torch.int8), scales


def dequantised(weight: Tensor) -> Tensor:
    """`weight` [out, in], or rows of activations, rounded to what int8 holds, in its own dtype."""
    steps, scales = quantise(weight)
    return (steps * scales[:, None]).to(weight.dtype)
