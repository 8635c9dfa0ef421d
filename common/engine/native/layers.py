"""The element-wise parts of a layer by layers.cpp: one call where torch takes five."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from common.engine.kv_cache import KvCache
from common.engine.layers import Placement
from common.engine.native import structs

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class NativeLayers:
    """Every row is computed by itself in one fixed order: batch-invariant as it is.

    Tensors are contiguous, and float32 or bfloat16.
    """

    def __init__(self, eps: float, library: ctypes.CDLL) -> None:
        self._eps = eps
        self._rms_norm = library.kvbaton_rms_norm
        self._rms_norm.argtypes = (*[_POINTER] * 3, _LONG, _LONG, ctypes.c_float, _INT, _INT)
        self._swiglu = library.kvbaton_swiglu
        self._swiglu.argtypes = (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT)
        self._place = library.kvbaton_place
        self._place.argtypes = (*[_POINTER] * 6, _LONG, _INT, _INT, _INT)
        for function in (self._rms_norm, self._swiglu, self._place):
            function.restype = None

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Layers."""
        assert x.is_contiguous()
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, self._eps, *_how(x)
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See Layers."""
        assert gate_up.is_contiguous()
        rows, both = gate_up.shape
        out = gate_up.new_empty(rows, both // 2)
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, both // 2, *_how(out))
        return out

    def place(
        self, qkv: Tensor, norm: Tensor | None, placement: Placement, cache: KvCache, layer: int
    ) -> None:
        """See Layers."""
        assert qkv.is_contiguous()
        layout, keys = cache.layout, cache.blocks[0, layer]
        how = structs.Placement(
            slots=placement.slots.data_ptr(),
            offsets=placement.offsets.data_ptr(),
            block_stride=cache.blocks.stride(0),
            value_offset=keys.stride(0),
            num_heads=qkv.shape[1] - 2 * layout.num_kv_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            eps=self._eps,
        )
        self._place(
            ctypes.addressof(how),
            qkv.data_ptr(),
            None if norm is None else norm.data_ptr(),
            placement.cos.data_ptr(),
            placement.sin.data_ptr(),
            keys.data_ptr(),
            placement.num_tokens,
            int(qkv.dtype is torch.bfloat16),
            int(cache.is_int8),
            torch.get_num_threads(),
        )


def _how(x: Tensor) -> tuple[int, int]:
    """The last arguments of most calls: whether it is bfloat16, and how many threads."""
    return int(x.dtype is torch.bfloat16), torch.get_num_threads()
