"""Matrix products with weights packed once into the layout that the CPU's kernels want."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.quantization import dequantised

# One row streams packed bf16 weights slower than four do: oneDNN's one-row kernels are not blocked.
MIN_ROWS = 4


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear:
    """y = x W^T + b, for x of shape [rows, in] and W of [out, in].

    On a CPU with oneDNN the weight is stored blocked (Inductor's packed linear; the plain layout is
    not kept). Elsewhere it is torch's own linear.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.packed = _can_pack(weight.dtype, weight.device)
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return functional.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class QuantisedLinear(Linear):
    """The product of what int8 holds of W; kept and computed like others: no smaller, no faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(dequantised(weight), bias)


class RoundingLinear(QuantisedLinear):
    """The same, of what int8 holds of each row of x."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(dequantised(x))


# By QUANTIZATIONS.
LINEARS: dict[str, type[Linear]] = {
    "none": Linear,
    "int8": QuantisedLinear,
    "w8a8_int8": RoundingLinear,
}
