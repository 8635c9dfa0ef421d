"""Decode steps filled up to sizes for which graphs exist: the rows that fill up leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.engine.attention.base import AttentionShape
from common.engine.attention.xformers import XformersAttention, table_width
from common.engine.cuda.buckets import (
    BATCH_SIZES,
    batch_size,
    empty_step,
    fill_up,
    fits_a_graph,
)
from common.engine.cuda.copies import DevicePool
from common.engine.cuda.engine import DeviceEngine
from common.engine.cuda.graphs import DecodeGraphs
from common.engine.work import Sampled, Work
from kvbaton.sampling import SamplingParams
from tests.unit.engine_models import GREEDY, build, whole
from tests.unit.test_attention import _DenseKernels


def test_sizes_grow_and_never_waste_half() -> None:
    assert list(BATCH_SIZES) == sorted(set(BATCH_SIZES))
    for count in range(1, BATCH_SIZES[-1] + 1):
        assert count <= batch_size(count) < 2 * count


def test_table_widths_are_powers_of_two() -> None:
    assert [table_width(used) for used in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"start": 1, "num_tokens": 2}, False),
        ({"sample": False}, False),
        ({"prompt_logprobs": 1}, False),
    ],
)
def test_only_steps_of_one_row_each_are_graphs(changes: dict[str, Any], fits: bool) -> None:
    plain = Work([1, 2, 3], 3, 2, 1, [0], GREEDY)
    values: dict[str, Any] = {"start": 2, "num_tokens": 1, **changes}
    other = Work([1, 2, 3], 3, slots=[0], sampling=SamplingParams(), **values)
    assert fits_a_graph([plain, plain]) is True
    assert fits_a_graph([plain, other]) is fits
    assert fits_a_graph([plain] * BATCH_SIZES[-1]) is True
    assert fits_a_graph([plain] * (BATCH_SIZES[-1] + 1)) is False


def test_padding_is_a_sequence_of_one_token_in_the_spare_block() -> None:
    tables = np.array([[5, 6, 7], [8, 9, 0]], dtype=np.int32)
    rows = [np.array([value, value + 1, 99]) for value in (10, 20, 30, 40)]  # with a row beyond
    step = fill_up(rows, np.array([150, 70], dtype=np.int32), tables, 4, 4)
    assert step.rows.tolist() == [[10, 11, 0, 0], [20, 21, 0, 0], [30, 31, 0, 0], [40, 41, 0, 0]]
    assert step.tables[:4].tolist() == [150, 70, 1, 1]
    assert step.tables[4:].reshape(4, 4).tolist() == [
        [5, 6, 7, 0], [8, 9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    assert empty_step(4, 4).tables[:4].tolist() == [1, 1, 1, 1]


class _Repeats:
    """`capture` without a GPU: what was captured is computed again. Counts both."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_captures += 1

        def replay() -> Tensor:
            self.num_replays += 1
            return compute()

        return replay


class _Kernels(_DenseKernels):
    """Goes by the lengths that the kernel reads, as the kernel does."""

    def memory_efficient_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float, op: Any
    ) -> Tensor:
        attn_bias.k_seqinfo.seqlen_py = attn_bias.k_seqinfo.seqlen.tolist()
        return super().memory_efficient_attention_forward(
            q, k, v, attn_bias=attn_bias, scale=scale, op=op
        )


class _Engine(DeviceEngine):
    """On the CPU; keeps the logits of the last step."""

    seen: Tensor

    def _draw(self, logits: Tensor, works: Sequence[Work]) -> list[Sampled | None]:
        self.seen = logits.clone()
        return super()._draw(logits, works)


@pytest.mark.filterwarnings("ignore")
def test_graphs_give_what_plain_steps_give_and_padding_leaves_no_trace(tmp_path: Path) -> None:
    pytest.importorskip("xformers")
    build("qwen3", tmp_path)
    engine = _Engine(tmp_path, device="cpu", attention="torch", block_size=64)
    engine.attach(memoryview(bytearray(16 * engine.info.layout.block_bytes)))
    pool = engine._cache
    assert isinstance(pool, DevicePool)
    attention = XformersAttention(AttentionShape(4, 2, 32, 64, [None, None]), device="cpu")
    attention._fmha = _Kernels(attention._fmha)
    capture = _Repeats()
    graphs = DecodeGraphs(engine.model, attention, pool, capture)
    lengths = [3, 64, 65, 130, 20]
    tokens = [[7 * place % 250 for place in range(length)] for length in lengths]
    tables = [[3 * index, 3 * index + 1, 3 * index + 2] for index in range(5)]
    for text, table in zip(tokens, tables, strict=True):
        engine.step_sync([whole(text, table)])

    def decode(count: int, nth: int) -> list[Sampled | None]:
        """A step that gives the first sequences their nth token after the prompt."""
        each = list(zip(tokens, tables, strict=True))[:count]
        return engine.step_sync(
            [whole([*text, *([9] * nth)], table, len(text) + nth - 1) for text, table in each]
        )

    for count, nth in ((3, 1), (5, 1), (1, 2), (3, 2), (5, 2)):
        engine._graphs = None
        expected, logits = decode(count, nth), engine.seen
        kv = pool.blocks[1:].clone()
        engine._graphs = graphs
        assert decode(count, nth) == expected
        torch.testing.assert_close(engine.seen, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pool.blocks[1:], kv, atol=1e-5, rtol=1e-5)
    assert (capture.num_captures, capture.num_replays) == (3, 5)
    engine.close()
