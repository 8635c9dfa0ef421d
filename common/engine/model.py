"""One decoder-only transformer for all supported families, over one flattened axis of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from common.engine.attention.base import AttentionBackend, Batch
from common.engine.config import ModelConfig
from common.engine.invariance import agreeing_row_counts, tile_rows
from common.engine.kv_cache import KvCache
from common.engine.layers import Layers, Placement
from common.engine.linear import LINEARS, MIN_ROWS, Linear
from common.engine.rotary import rotary_tables
from common.engine.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class StepInput:
    """Rows of a step; all int64. Rows from num_tokens on are padding and leave no trace.

    tokens and positions are [rows]; slots and offsets, [num_tokens], say where the KV of each token
    goes; sample_rows lists the rows whose next token is wanted.
    """

    num_tokens: int
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    offsets: Tensor
    sample_rows: Tensor


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What an engine's model is made from, and how: see TorchEngine for the settings."""

    attention: str
    config: ModelConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    block_size: int
    max_model_len: int
    batch_invariant: bool
    quantization: str


L = TypeVar("L")
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out, in] as the parts it is stacked from, and its bias [out] or None.

    The parts are views of the checkpoint, whose pages are read when they are stacked in `dtype`.
    """

    parts: Sequence[Tensor]
    dtype: torch.dtype
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(part) for part in self.parts), self.parts[0].shape[1]

    def stacked(self) -> Tensor:
        """[out, in]"""
        parts = [part.to(self.dtype) for part in self.parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]  # cat would copy a large head


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[L]):
    """One layer; matrices that share their input are stacked into one product of kind L.

    Norms are [hidden_size]; qk_norm is [num_heads + num_kv_heads, head_dim], or None.
    """

    input_norm: Tensor
    qkv: L
    qk_norm: Tensor | None
    output: L
    post_norm: Tensor
    gate_up: L
    down: L

    def matrices(self) -> tuple[L, L, L, L]:
        """Its products, in the order of their use and of `map`."""
        return self.qkv, self.output, self.gate_up, self.down

    def map(self, change: Callable[[L], M]) -> LayerWeights[M]:
        """The same layer with its products of another kind."""
        return LayerWeights(
            input_norm=self.input_norm,
            qkv=change(self.qkv),
            qk_norm=self.qk_norm,
            output=change(self.output),
            post_norm=self.post_norm,
            gate_up=change(self.gate_up),
            down=change(self.down),
        )


class Multiplies(Protocol):
    """y = x W^T + b for x [rows, in_features]."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out_features]"""


class Forward(Protocol):
    """A model with its weights: what the runner asks of it, and benchmarks."""

    name: str
    config: ModelConfig

    def linears(self) -> Iterator[Multiplies]:
        """Every matrix product of a step, in order."""

    def num_rows(self, count: int) -> int:
        """How many rows a step of `count` tokens has, with its padding."""

    def forward(self, step: StepInput, batch: Batch, cache: KvCache) -> Tensor:
        """The residual stream after the last layer, [rows, hidden_size]: see `logits`.

        Writes the KV of the step's tokens.
        """

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits of these rows (int64) of what forward() gave, [len(rows), vocab_size] in fp32."""


class Model:
    """The forward pass in torch. Computes in `dtype`, rounding where transformers does.

    `name` tells apart what may give other bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        layers: Layers,
        attention: AttentionBackend,
        *,
        max_model_len: int,
        batch_invariant: bool,
        quantization: str,
    ) -> None:
        self.config = config
        self.name = attention.name
        self._ops = layers
        self.attention = attention
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", dtype)
        self._norm = checkpoint.tensor("model.norm.weight", dtype)
        tied = config.tie_word_embeddings
        self._linear = LINEARS[quantization]
        head = self._embedding if tied else checkpoint.tensor("lm_head.weight", dtype)
        self._head = self._linear(head)
        angles = rotary_tables(config.rope, config.head_dim, max_model_len, dtype)
        self._cos, self._sin = (table.to(self._embedding.device) for table in angles)
        self._layers = [
            layer_weights(config, checkpoint, index, dtype).map(self._product)
            for index in range(config.num_layers)
        ]
        self._row_counts = agreeing_row_counts(self.linears()) if batch_invariant else ()

    def _product(self, matrix: Matrix) -> Linear:
        return self._linear(matrix.stacked().to(self._embedding.device), matrix.bias)

    def linears(self) -> Iterator[Linear]:
        """See Forward."""
        for layer in self._layers:
            yield from layer.matrices()
        yield self._head

    def num_rows(self, count: int) -> int:
        """See Forward."""
        return sum(self._tiles(count))

    def _tiles(self, count: int) -> list[int]:
        """Sizes of the row tiles to compute for `count` rows; together at least `count`."""
        return tile_rows(count, self._row_counts) if self._row_counts else [max(count, MIN_ROWS)]

    def forward(self, step: StepInput, batch: Batch, cache: KvCache) -> Tensor:
        """See Forward."""
        self.attention.plan(batch)
        return self.compute(step, cache)

    def compute(self, step: StepInput, cache: KvCache) -> Tensor:
        """forward() where attention has its plan already."""
        config, count = self.config, step.num_tokens
        tiles = self._tiles(count)
        x = functional.embedding(step.tokens, self._embedding)
        placement = Placement(
            count, self._cos[step.positions], self._sin[step.positions], step.slots, step.offsets
        )
        attended = x.new_zeros(len(x), config.num_heads, config.head_dim)
        for index, layer in enumerate(self._layers):
            qkv = _by_tile(tiles, self._project, layer, x).view(len(x), -1, config.head_dim)
            self._ops.place(qkv, layer.qk_norm, placement, cache, index)
            self.attention.attend(index, qkv[:, : config.num_heads], cache, attended)
            x = _by_tile(tiles, self._combine, layer, x, attended)
        return x

    def _project(self, layer: LayerWeights[Linear], x: Tensor) -> Tensor:
        """Queries, keys and values, [rows, (num_heads + 2 * num_kv_heads) * head_dim]."""
        return layer.qkv(self._ops.rms_norm(x, layer.input_norm))

    def _combine(self, layer: LayerWeights[Linear], x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention's output and the feed-forward part."""
        x = x + layer.output(attended.view(len(x), -1))
        normed = self._ops.rms_norm(x, layer.post_norm)
        return x.add_(layer.down(self._ops.swiglu(layer.gate_up(normed))))

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Forward."""
        count = len(rows)
        if count == 0:
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        tiles = self._tiles(count)
        x = functional.pad(x[rows], (0, 0, 0, sum(tiles) - count))
        return _by_tile(tiles, self._unembed, x)[:count].float()

    def _unembed(self, x: Tensor) -> Tensor:
        return self._head(self._ops.rms_norm(x, self._norm))


def _by_tile(tiles: list[int], part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """part(*inputs) with the tensors among them cut into row tiles, the results put together."""
    if len(tiles) == 1:
        return part(*inputs)
    cut = [
        torch.split(item, tiles) if isinstance(item, Tensor) else [item] * len(tiles)
        for item in inputs
    ]
    return torch.cat([part(*tile) for tile in zip(*cut, strict=True)])


def layer_weights(
    config: ModelConfig, checkpoint: Checkpoint, index: int, dtype: torch.dtype
) -> LayerWeights[Matrix]:
    """One layer, its matrices as they lie in the checkpoint."""
    prefix = f"model.layers.{index}."

    def tensor(name: str) -> Tensor:
        """A small one: a view would keep the pages of all that the file has."""
        return checkpoint.tensor(prefix + name, dtype).clone()

    def matrix(names: tuple[str, ...], bias: bool) -> Matrix:
        """Matrices that share their input, to be stacked into one."""
        return Matrix(
            [checkpoint.stored(f"{prefix}{name}.weight") for name in names],
            dtype,
            torch.cat([tensor(f"{name}.bias") for name in names]) if bias else None,
        )

    qk_norm = None
    if config.qk_norm:
        qk_norm = torch.cat(
            [
                tensor("self_attn.q_norm.weight").expand(config.num_heads, -1),
                tensor("self_attn.k_norm.weight").expand(config.num_kv_heads, -1),
            ]
        )
    return LayerWeights(
        input_norm=tensor("input_layernorm.weight"),
        qkv=matrix(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.qkv_bias),
        qk_norm=qk_norm,
        output=matrix(("self_attn.o_proj",), config.output_bias),
        post_norm=tensor("post_attention_layernorm.weight"),
        gate_up=matrix(("mlp.gate_proj", "mlp.up_proj"), config.mlp_bias),
        down=matrix(("mlp.down_proj",), config.mlp_bias),
    )
