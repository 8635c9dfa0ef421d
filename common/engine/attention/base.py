"""What the model asks of an attention backend, and the batch both agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from common.engine.config import ModelConfig
from common.engine.kv_cache import KvCache

Int32Array = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads and per-layer windows; `windows[i]` counts the visible positions, None means all.

    Queries are scaled by head_dim ** -0.5.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    windows: Sequence[int | None]

    @classmethod
    def of(cls, config: ModelConfig, block_size: int) -> AttentionShape:
        """The shape of a model's attention over blocks of so many positions."""
        return cls(
            config.num_heads, config.num_kv_heads, config.head_dim, block_size, config.windows
        )

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of a step, on one flattened token axis. All arrays are int32.

    Sequence i owns rows [row_starts[i], row_starts[i + 1]); its first row stands at position
    starts[i]; tables[i] lists its blocks, padded at the end with zeros. The keys of the step's own
    positions are written before attention runs, so row r of sequence i sees positions
    0 .. starts[i] + r - row_starts[i].
    """

    row_starts: Int32Array
    starts: Int32Array
    tables: Int32Array

    @property
    def num_sequences(self) -> int:
        return len(self.starts)

    def lengths(self) -> Int32Array:
        """Positions of each sequence that hold keys once the step has written its own."""
        return self.starts + np.diff(self.row_starts)


class AttentionBackend(Protocol):
    """Causal attention of a step's rows over the paged KV. One object per engine.

    `name` tells apart what may give different bits: another kernel, or another build of it.
    """

    name: str

    def plan(self, batch: Batch) -> None:
        """Prepare for a step; done once, before its layers run."""

    def attend(self, layer: int, queries: Tensor, cache: KvCache, out: Tensor) -> None:
        """Write the attention output of `queries` [rows, num_heads, head_dim] to `out`, its like.

        Both may have rows beyond the batch's, which are left alone.
        """
