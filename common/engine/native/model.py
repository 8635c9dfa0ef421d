"""The transformer of model.py as one native call a step: what a CPU runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import structlog
import torch
from torch import Tensor
from torch.nn import functional

from common.engine.attention.base import Batch
from common.engine.config import ModelConfig
from common.engine.kv_cache import KvCache
from common.engine.model import LayerWeights, Matrix, StepInput, layer_weights
from common.engine.native import structs
from common.engine.native.library import build_name
from common.engine.native.packed import Packed, pack
from common.engine.rotary import rotary_tables
from common.engine.weights import Checkpoint

log = structlog.get_logger()


class NativeModel:
    """Weights and the forward pass, computed by forward.cpp. Implements Forward.

    Products are batch-invariant as they are; attention, in the mode that is so, has one way for few
    queries and for many.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        library: ctypes.CDLL,
        *,
        max_model_len: int,
        batch_invariant: bool,
        quantization: str,
    ) -> None:
        self.config = config
        self.name = build_name(library)
        self._library = library
        self._fixed_order = batch_invariant
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", dtype)
        self._norm = checkpoint.tensor("model.norm.weight", dtype)
        self._cos, self._sin = rotary_tables(config.rope, config.head_dim, max_model_len, dtype)
        self._layers, self._head = _pack(config, checkpoint.again(), dtype, library, quantization)
        log.info("weights_packed", num_layers=config.num_layers)
        self._records = (structs.Layer * config.num_layers)(
            *(
                _record(layer, window)
                for layer, window in zip(self._layers, config.windows, strict=True)
            )
        )
        self._weights = structs.Weights(
            layers=self._records,
            norm=self._norm.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            head=self._head.product,
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )

    def linears(self) -> Iterator[Packed]:
        """See Forward."""
        for layer in self._layers:
            yield from layer.matrices()
        yield self._head

    def num_rows(self, count: int) -> int:
        """See Forward."""
        return count

    def forward(self, step: StepInput, batch: Batch, cache: KvCache) -> Tensor:
        """See Forward."""
        x = functional.embedding(step.tokens, self._embedding)
        record = self._step(step, batch, cache)
        self._library.kvbaton_forward(
            ctypes.byref(self._weights),
            ctypes.byref(record),
            ctypes.c_void_p(cache.blocks.data_ptr()),
            ctypes.c_void_p(x.data_ptr()),
            int(x.dtype is torch.bfloat16),
            int(cache.is_int8),
            torch.get_num_threads(),
        )
        return x

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Forward."""
        out = torch.empty(len(rows), self.config.vocab_size)
        if len(rows):
            self._library.kvbaton_logits(
                ctypes.byref(self._weights),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_void_p(rows.data_ptr()),
                ctypes.c_int64(len(rows)),
                ctypes.c_void_p(out.data_ptr()),
                int(x.dtype is torch.bfloat16),
                torch.get_num_threads(),
            )
        return out

    def _step(self, step: StepInput, batch: Batch, cache: KvCache) -> structs.Step:
        """Points into the arrays of the three: they must outlive it."""
        assert batch.tables.flags.c_contiguous
        config, keys = self.config, cache.blocks[0, 0]
        shape = {
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "block_size": cache.layout.block_size,
            "block_stride": cache.blocks.stride(0),
            "value_offset": keys.stride(0),
        }
        return structs.Step(
            rows=step.num_tokens,
            positions=step.positions.data_ptr(),
            placement=structs.Placement(
                slots=step.slots.data_ptr(),
                offsets=step.offsets.data_ptr(),
                eps=config.rms_norm_eps,
                **shape,
            ),
            attention=structs.Problem(
                query_stride=(config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
                out_stride=config.num_heads * config.head_dim,
                row_starts=batch.row_starts.ctypes.data,
                starts=batch.starts.ctypes.data,
                tables=batch.tables.ctypes.data,
                table_stride=batch.tables.shape[1],
                num_sequences=batch.num_sequences,
                fixed_order=self._fixed_order,
                scale=config.head_dim**-0.5,
                **shape,
            ),
            layer_stride=cache.blocks.stride(1),
        )


def _pack(
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    library: ctypes.CDLL,
    quantization: str,
) -> tuple[list[LayerWeights[Packed]], Packed]:
    """All layers and the head.

    `checkpoint` is used for nothing else: once it is let go, its pages are not this process's.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    layers = [layer_weights(config, checkpoint, index, dtype) for index in range(config.num_layers)]
    matrices = [matrix for layer in layers for matrix in layer.matrices()]
    matrices.append(Matrix([checkpoint.stored(head)], dtype))
    packed = iter(pack(library, matrices, quantization))
    return [layer.map(lambda _: next(packed)) for layer in layers], next(packed)


def _record(layer: LayerWeights[Packed], window: int | None) -> structs.Layer:
    return structs.Layer(
        input_norm=layer.input_norm.data_ptr(),
        qk_norm=None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
        post_norm=layer.post_norm.data_ptr(),
        qkv=layer.qkv.product,
        output=layer.output.product,
        gate_up=layer.gate_up.product,
        down=layer.down.product,
        window=window or 0,
    )
