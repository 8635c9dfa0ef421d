"""The model that a CPU runs: native where that can be compiled, else in torch."""

from __future__ import annotations

import torch

from common.engine.attention import make_backend, make_layers, native_library
from common.engine.attention.base import AttentionShape
from common.engine.config import ModelConfig
from common.engine.model import Forward, Model
from common.engine.native.model import NativeModel
from common.engine.weights import Checkpoint


def make_model(
    name: str,
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    max_model_len: int,
    block_size: int,
    batch_invariant: bool,
    quantization: str,
) -> Forward:
    """The model that attends with the backend `name`, one of attention.BACKENDS, its matrices
    packed as `quantization` says, one of QUANTIZATIONS.

    Raises ModelError for a name that is unknown or cannot be had here.
    """
    library = native_library(name)
    if library is not None:
        return NativeModel(
            config,
            checkpoint,
            dtype,
            library,
            max_model_len=max_model_len,
            batch_invariant=batch_invariant,
            quantization=quantization,
        )
    shape = AttentionShape.of(config, block_size)
    return Model(
        config,
        checkpoint,
        dtype,
        make_layers(name, config.rms_norm_eps, fixed_order=batch_invariant),
        make_backend(name, shape, fixed_order=batch_invariant),
        max_model_len=max_model_len,
        batch_invariant=batch_invariant,
        quantization=quantization,
    )
