"""Decode steps as CUDA graphs: a step is two copies and one launch, whatever the model's depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.engine.attention.base import Batch
from common.engine.attention.xformers import XformersAttention, table_width
from common.engine.cuda.buckets import batch_size, empty_step, fill_up
from common.engine.kv_cache import KvCache
from common.engine.model import Model, StepInput

Replay = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class _Captured:
    """Where a graph reads its step, as in PaddedStep, and how to run it."""

    rows: Tensor
    tables: Tensor
    replay: Replay


class DecodeGraphs:
    """Captures a graph for each batch size and table width when it is first needed.

    `capture` turns a computation, whose tensors stay where they are, into one that can be repeated
    cheaply and gives its result in the same place each time.
    """

    def __init__(
        self,
        model: Model,
        attention: XformersAttention,
        cache: KvCache,
        capture: Callable[[Callable[[], Tensor]], Replay],
    ) -> None:
        self._model = model
        self._attention = attention
        self._cache = cache
        self._capture = capture
        self._captured: dict[tuple[int, int], _Captured] = {}

    def run(self, step: StepInput, batch: Batch) -> Tensor:
        """Logits [sequences, vocab_size] in fp32, valid until the next step, of one that has a row
        for each sequence and fits_a_graph. Its tensors are on the CPU, its blocks the cache's."""
        size = batch_size(batch.num_sequences)
        width = table_width(batch.tables.shape[1])
        captured = self._captured.get((size, width)) or self._make(size, width)
        rows = (step.tokens, step.positions, step.slots, step.offsets)
        padded = fill_up([row.numpy() for row in rows], batch.lengths(), batch.tables, size, width)
        captured.rows.copy_(torch.from_numpy(padded.rows))
        captured.tables.copy_(torch.from_numpy(padded.tables))
        return captured.replay()[: batch.num_sequences]

    def _make(self, size: int, width: int) -> _Captured:
        device = self._cache.blocks.device
        padding = empty_step(size, width)
        rows = torch.from_numpy(padding.rows).to(device)
        tables = torch.from_numpy(padding.tables).to(device)
        everyone = torch.arange(size, device=device)
        tokens, positions, slots, offsets = rows
        step = StepInput(size, tokens, positions, slots, offsets, everyone)

        part = self._attention.part_in_place(tables[size:].view(size, width), tables[:size])

        def compute() -> Tensor:
            self._attention.use(part)
            hidden = self._model.compute(step, self._cache)
            return self._model.logits(hidden, everyone)

        captured = _Captured(rows, tables, self._capture(compute))
        self._captured[size, width] = captured
        return captured


class CudaCapture:
    """`capture` on a GPU. All graphs share one pool of memory: they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        """Runs `compute` twice to warm up: kernels are compiled and libraries set up then."""
        warming = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile, which concerns no capture but their own.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
