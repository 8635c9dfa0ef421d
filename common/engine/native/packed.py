"""Weights in the layout that product.h reads, and one product by itself."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.model import Matrix
from common.engine.native.structs import Product
from common.engine.quantization import quantise

_ALIGNMENT = 4096


class Packed:
    """y = x W^T + b for x [rows, in] and W [out, in], float32 or bfloat16.

    `weights` is W in panels, [panels, steps, panel, depth] with zeros beyond the matrix; with
    `scales` [out] it is W quantised (see quantization.py), and x, b and y are of W's own type; with
    `rounds` each row of x is quantised too before it is multiplied.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        matrix: Matrix,
        weights: Tensor,
        scales: Tensor | None,
        *,
        rounds: bool,
    ) -> None:
        self.out_features, self.in_features = matrix.shape
        self.dtype = matrix.dtype
        self._library = library
        self._weights = weights
        self._scales = scales
        self._bias = matrix.bias
        self.product = Product(
            weights=weights.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            bias=None if matrix.bias is None else matrix.bias.data_ptr(),
            inputs=self.in_features,
            outputs=self.out_features,
            rounds=rounds,
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
    library: ctypes.CDLL, matrices: Sequence[Matrix], quantization: str = "none"
) -> list[Packed]:
    """All matrices, one after another in memory with huge pages where the system has them.

    `quantization` is one of QUANTIZATIONS.
    """
    places, end = [], 0
    for matrix in matrices:
        dtype = matrix.dtype if quantization == "none" else torch.int8
        places.append(_Place(library, matrix, dtype, end))
        end = places[-1].end

    whole = mmap.mmap(-1, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones have none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            whole.madvise(mmap.MADV_HUGEPAGE)
    for matrix, place in zip(matrices, places, strict=True):
        place.fill(whole, matrix)
    rounds = quantization == "w8a8_int8"
    return [
        Packed(library, matrix, place.weights(whole), place.scales(whole), rounds=rounds)
        for matrix, place in zip(matrices, places, strict=True)
    ]


class _Place:
    """Where one matrix lies: its panels, and after them its scales, if it is quantised."""

    def __init__(
        self, library: ctypes.CDLL, matrix: Matrix, dtype: torch.dtype, begin: int
    ) -> None:
        rows, columns = matrix.shape
        panel, depth = library.kvbaton_panel(), library.kvbaton_depth(dtype.itemsize)
        self._shape = (-(-rows // panel), -(-columns // depth), int(panel), int(depth))
        self._dtype, self._begin = dtype, begin
        self._scales_at = _aligned(begin + math.prod(self._shape) * dtype.itemsize)
        self._num_scales = rows if dtype is torch.int8 else 0
        self.end = _aligned(self._scales_at + self._num_scales * torch.float32.itemsize)

    def weights(self, whole: mmap.mmap) -> Tensor:
        count = math.prod(self._shape)
        flat = torch.frombuffer(whole, dtype=self._dtype, count=count, offset=self._begin)
        return flat.view(self._shape)

    def scales(self, whole: mmap.mmap) -> Tensor | None:
        if not self._num_scales:
            return None
        return torch.frombuffer(
            whole, dtype=torch.float32, count=self._num_scales, offset=self._scales_at
        )

    def fill(self, whole: mmap.mmap, matrix: Matrix) -> None:
        """Every `depth` numbers are 4 bytes, which are moved together."""
        weight, scales = matrix.stacked(), self.scales(whole)
        if scales is not None:
            weight, found = quantise(weight)
            scales.copy_(found)
        num_panels, steps, panel, depth = self._shape
        missing = (num_panels * panel - weight.shape[0], steps * depth - weight.shape[1])
        if any(missing) or weight.storage_offset() % depth:
            weight = functional.pad(weight, (0, missing[1], 0, missing[0]))
        cut = weight.view(torch.int32).view(num_panels, panel, steps)
        packed = self.weights(whole).view(torch.int32).view(num_panels, steps, panel)
        packed.copy_(cut.transpose(1, 2))


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
