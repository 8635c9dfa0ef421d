"""Weights in the layout that product.h reads, and one product by itself."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.native.structs import Product
from common.engine.quantization import quantise


class Packed:
    """y = x W^T + b for x [rows, in] and W [out, in], float32 or bfloat16, packed into panels.

    With `int8` the panels hold the weight quantised (see quantization.py) and are half or a quarter
    as large; x, b and y stay of the weight's type.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._library = library
        self._scales: Tensor | None = None
        if int8:
            weight, self._scales = quantise(weight)
        self._weights = _panels(weight, library.kvbaton_panel(), _depth(library, weight.dtype))
        self._bias = bias
        self.product = Product(
            weights=self._weights.data_ptr(),
            scales=None if self._scales is None else self._scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            inputs=self.in_features,
            outputs=self.out_features,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The product by itself."""
        assert x.is_contiguous()
        assert x.dtype is self.dtype
        y = x.new_empty(len(x), self.out_features)
        self._library.kvbaton_product(
            ctypes.byref(self.product),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(len(x)),
            int(x.dtype is torch.bfloat16),
            torch.get_num_threads(),
        )
        return y


def _depth(library: ctypes.CDLL, dtype: torch.dtype) -> int:
    return int(library.kvbaton_depth(dtype.itemsize))


def _panels(weight: Tensor, panel: int, depth: int) -> Tensor:
    """[panels, steps, panel, depth] with zeros beyond the matrix."""
    rows, columns = weight.shape
    if rows % panel or columns % depth:
        weight = functional.pad(weight, (0, -columns % depth, 0, -rows % panel))
    cut = weight.view(weight.shape[0] // panel, panel, weight.shape[1] // depth, depth)
    return cut.transpose(1, 2).contiguous()
