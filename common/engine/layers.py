"""The element-wise parts of a transformer layer, rounded where transformers rounds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.invariance import in_fixed_parts
from common.engine.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of a step stand. Row i goes to row offsets[i] of block slots[i] (both int64).

    cos and sin are [rows, head_dim], in the model's dtype, and may have rows beyond `num_tokens`.
    """

    num_tokens: int
    cos: Tensor
    sin: Tensor
    slots: Tensor
    offsets: Tensor


class Layers(Protocol):
    """The operations that the model needs besides matrix products and attention."""

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square normalisation of x [rows, width] in fp32 (Zhang and Sennrich, 2019)."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [rows, 2 * inner] (Shazeer, GLU Variants, 2020)."""

    def place(
        self, qkv: Tensor, norm: Tensor | None, placement: Placement, cache: KvCache, layer: int
    ) -> None:
        """Rotate queries and keys in place, normalised with `norm` [heads, head_dim] first where
        there is one, and store keys and values.

        qkv is [rows, num_heads + 2 * num_kv_heads, head_dim]; rows from num_tokens on are padding.
        """


class TorchLayers:
    """In torch. With `fixed_order` the bits of a row do not depend on where it lies."""

    def __init__(self, eps: float, *, fixed_order: bool) -> None:
        self._eps = eps
        self._fixed_order = fixed_order

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Layers."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self._eps))
        return (wide * scale).to(x.dtype).mul_(weight)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See Layers."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self._fixed_order:
            return in_fixed_parts(_silu_in_place, gate).mul_(up)
        return functional.silu(gate).mul_(up)

    def place(
        self, qkv: Tensor, norm: Tensor | None, placement: Placement, cache: KvCache, layer: int
    ) -> None:
        """See Layers."""
        num_kv_heads, count = cache.layout.num_kv_heads, placement.num_tokens
        self.turn(qkv[:, :-num_kv_heads], norm, placement.cos, placement.sin)
        keys_values = qkv[:count, -2 * num_kv_heads :]
        cache.write(
            layer,
            keys_values.view(count, 2, num_kv_heads, cache.layout.head_dim),
            placement.slots,
            placement.offsets,
        )

    def turn(self, heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        """Normalise heads [rows, heads, head_dim], where there is a norm, and rotate them in
        place."""
        turned = heads if norm is None else self.rms_norm(heads, norm)
        heads.copy_(_rotate(turned, cos[:, None], sin[:, None]))


def _silu_in_place(x: Tensor) -> Tensor:
    return functional.silu(x, inplace=True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, head_dim] with cos and sin [rows, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos).add_(turned.mul_(sin))
