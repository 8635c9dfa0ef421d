"""Weights in the layout that product.h reads, and one product by itself."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.model import Matrix
from common.engine.native.structs import Product

_ALIGNMENT = 4096


class Packed:
    """y = x W^T + b for x [rows, in] and W [out, in], float32 or bfloat16.

    `weights` is W in panels: [panels, steps, panel, depth], with zeros beyond the matrix.
    """

    def __init__(self, library: ctypes.CDLL, matrix: Matrix, weights: Tensor) -> None:
        self.out_features, self.in_features = matrix.shape
        self.dtype = weights.dtype
        self._library = library
        self._weights = weights
        self._bias = matrix.bias
        self.product = Product(
            weights=weights.data_ptr(),
            bias=None if matrix.bias is None else matrix.bias.data_ptr(),
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


def pack(
    library: ctypes.CDLL,
    matrices: Sequence[Matrix],
    memory: Callable[[int, Callable[[mmap.mmap], None]], mmap.mmap],
) -> list[Packed]:
    """All matrices, in what memory(num_bytes, fill) gives: fill is called if it is not filled."""
    shapes = [_panel_shape(library, matrix) for matrix in matrices]
    places, end = [], 0
    for shape, matrix in zip(shapes, matrices, strict=True):
        places.append(end)
        end += -(-math.prod(shape) * matrix.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(whole: mmap.mmap) -> list[Tensor]:
        return [
            torch.frombuffer(whole, dtype=matrix.dtype, count=math.prod(shape), offset=place).view(
                shape
            )
            for matrix, shape, place in zip(matrices, shapes, places, strict=True)
        ]

    def fill(whole: mmap.mmap) -> None:
        for matrix, panels in zip(matrices, views(whole), strict=True):
            _fill(panels, matrix.stacked())

    packed = views(memory(end, fill))
    return [Packed(library, *pair) for pair in zip(matrices, packed, strict=True)]


def _panel_shape(library: ctypes.CDLL, matrix: Matrix) -> tuple[int, int, int, int]:
    rows, columns = matrix.shape
    panel = int(library.kvbaton_panel())
    depth = int(library.kvbaton_depth(int(matrix.dtype is torch.bfloat16)))
    return -(-rows // panel), -(-columns // depth), panel, depth


def _fill(panels: Tensor, weight: Tensor) -> None:
    num_panels, steps, panel, depth = panels.shape
    missing = (num_panels * panel - weight.shape[0], steps * depth - weight.shape[1])
    if any(missing):
        weight = functional.pad(weight, (0, missing[1], 0, missing[0]))
    panels.copy_(weight.view(num_panels, panel, steps, depth).transpose(1, 2))
