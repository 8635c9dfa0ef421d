"""The element-wise parts of a layer on a GPU: one kernel each, where plain torch takes eight."""

from __future__ import annotations

import structlog
import torch
from torch import Tensor

from common.engine.layers import TorchLayers

log = structlog.get_logger()


class CompiledLayers(TorchLayers):
    """TorchLayers through torch.compile, which fuses each operation into one kernel.

    A fused kernel keeps in fp32 what TorchLayers rounds between two operations.
    """

    def __init__(self, eps: float) -> None:
        super().__init__(eps, fixed_order=False)
        plain = TorchLayers(eps, fixed_order=False)
        self._fused_norm = torch.compile(plain.rms_norm)
        self._fused_swiglu = torch.compile(plain.swiglu)
        self._fused_turn = torch.compile(plain.turn)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Layers."""
        return self._fused_norm(x, weight)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See Layers."""
        return self._fused_swiglu(gate_up)

    def turn(self, heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        """See TorchLayers."""
        self._fused_turn(heads, norm, cos, sin)


def make_device_layers(eps: float, device: torch.device) -> TorchLayers:
    """Fused ones on a GPU where they can be compiled, which takes Triton and a C compiler."""
    if device.type != "cuda":
        return TorchLayers(eps, fixed_order=False)
    layers = CompiledLayers(eps)
    try:
        layers.rms_norm(torch.ones(2, 64, device=device), torch.ones(64, device=device))
    except Exception as error:
        log.warning("fused_layers_unavailable", reason=str(error)[:200], using="torch, slower")
        return TorchLayers(eps, fixed_order=False)
    return layers
