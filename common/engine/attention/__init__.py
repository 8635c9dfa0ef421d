"""Attention backends by name, each with the element-wise layers that go with it.

Each is imported only when it is asked for.
"""

from __future__ import annotations

import ctypes

import torch

from common.engine.attention.base import AttentionBackend, AttentionShape
from common.engine.config import ModelError
from common.engine.layers import Layers, TorchLayers

BACKENDS = ("auto", "native", "torch", "xformers")


def make_backend(name: str, shape: AttentionShape, *, fixed_order: bool) -> AttentionBackend:
    """The backend `name`, one of BACKENDS. auto is native where that can be compiled, else torch.

    With `fixed_order` a row's bits depend on its own sequence alone (batch invariance). Raises
    ModelError for a name that is unknown or cannot be had here.
    """
    if name == "xformers":
        from common.engine.attention.xformers import XformersAttention

        return XformersAttention(shape)
    library = native_library(name)
    if library is not None:
        from common.engine.attention.native import NativeAttention

        return NativeAttention(shape, library, fixed_order=fixed_order)
    if name not in ("auto", "torch"):
        raise ModelError(f"attention {name!r} is not available here; there are {BACKENDS}")
    from common.engine.attention.cpu import CpuAttention

    return CpuAttention(shape, fixed_order=fixed_order)


def make_layers(name: str, eps: float, *, fixed_order: bool) -> Layers:
    """The layers that go with the backend `name`: native ones with native attention."""
    library = native_library(name)
    if library is None:
        return TorchLayers(eps, fixed_order=fixed_order)
    from common.engine.native.layers import NativeLayers

    return NativeLayers(eps, library)


def native_library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels, if the backend `name` uses them and they can be had."""
    from common.engine.native.library import load_library

    return load_library(torch.get_num_threads() > 1) if name in ("auto", "native") else None
