"""Attention backends by name, and the model and the element-wise layers that go with each.

Each is imported only when it is asked for.
"""

from __future__ import annotations

import ctypes

import torch

from common.engine.attention.base import AttentionBackend, AttentionShape
from common.engine.config import ModelConfig, ModelError
from common.engine.layers import Layers, TorchLayers
from common.engine.model import Forward, Model
from common.engine.weights import Checkpoint

BACKENDS = ("auto", "native", "torch", "xformers")


def make_model(
    name: str,
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    max_model_len: int,
    block_size: int,
    *,
    batch_invariant: bool,
    quantization: str = "none",
) -> Forward:
    """The model that attends with the backend `name`: see make_backend.

    `quantization`, one of QUANTIZATIONS, is what its matrices are packed as.
    """
    library = _library(name)
    if library is not None:
        from common.engine.native.model import NativeModel

        return NativeModel(
            config,
            checkpoint,
            dtype,
            max_model_len,
            library,
            batch_invariant=batch_invariant,
            quantization=quantization,
        )
    shape = AttentionShape(
        config.num_heads, config.num_kv_heads, config.head_dim, block_size, config.windows
    )
    return Model(
        config,
        checkpoint,
        dtype,
        max_model_len,
        make_layers(name, config.rms_norm_eps, fixed_order=batch_invariant),
        make_backend(name, shape, fixed_order=batch_invariant),
        batch_invariant=batch_invariant,
        quantization=quantization,
    )


def make_backend(name: str, shape: AttentionShape, *, fixed_order: bool) -> AttentionBackend:
    """The backend `name`, one of BACKENDS. auto is native where that can be compiled, else torch.

    With `fixed_order` a row's bits depend on its own sequence alone (batch invariance). Raises
    ModelError for a name that is unknown or cannot be had here.
    """
    if name == "xformers":
        from common.engine.attention.xformers import XformersAttention

        return XformersAttention(shape)
    library = _library(name)
    if library is not None:
        from common.engine.attention.native import NativeAttention

        return NativeAttention(shape, library, fixed_order=fixed_order)
    if name not in ("auto", "torch"):
        raise ModelError(f"attention {name!r} is not available here; there are {BACKENDS}")
    from common.engine.attention.cpu import CpuAttention

    return CpuAttention(shape, fixed_order=fixed_order)


def make_layers(name: str, eps: float, *, fixed_order: bool) -> Layers:
    """The layers that go with the backend `name`: native ones with native attention."""
    library = _library(name)
    if library is None:
        return TorchLayers(eps, fixed_order=fixed_order)
    from common.engine.native.layers import NativeLayers

    return NativeLayers(eps, library)


def _library(name: str) -> ctypes.CDLL | None:
    from common.engine.native.library import load_library

    return load_library(torch.get_num_threads() > 1) if name in ("auto", "native") else None
