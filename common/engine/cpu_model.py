"""The model that a CPU runs: native where that can be compiled, else in torch."""

from __future__ import annotations

from common.engine.attention import make_backend, make_layers, native_library
from common.engine.attention.base import AttentionShape
from common.engine.model import Forward, Model, ModelPlan
from common.engine.native.model import NativeModel


def make_model(plan: ModelPlan) -> Forward:
    """The model that attends with one of attention.BACKENDS, its matrices packed as one of
    QUANTIZATIONS says.

    Raises ModelError for a backend that is unknown or cannot be had here.
    """
    name, config, dtype = plan.attention, plan.config, plan.dtype
    library = native_library(name)
    if library is not None:
        return NativeModel(
            config,
            plan.checkpoint,
            dtype,
            library,
            max_model_len=plan.max_model_len,
            batch_invariant=plan.batch_invariant,
            quantization=plan.quantization,
        )
    shape = AttentionShape.of(config, plan.block_size)
    return Model(
        config,
        plan.checkpoint,
        dtype,
        make_layers(name, config.rms_norm_eps, fixed_order=plan.batch_invariant),
        make_backend(name, shape, fixed_order=plan.batch_invariant),
        max_model_len=plan.max_model_len,
        batch_invariant=plan.batch_invariant,
        quantization=plan.quantization,
    )
