"""The engine that workers run: a model in torch, over the KV arena, on a thread of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.engine.attention.base import Batch, Int32Array
from common.engine.config import ModelConfig, ModelError, load_config
from common.engine.cpu_model import make_model
from common.engine.grammar import Grammars
from common.engine.kv_cache import TORCH_DTYPES, KvCache
from common.engine.model import Forward, ModelPlan, StepInput
from common.engine.quantization import KV_CACHE_DTYPES, QUANTIZATIONS
from common.engine.sampler import sample, score
from common.engine.step_thread import StepThread
from common.engine.weights import Checkpoint, fingerprint
from common.engine.work import DeviceMemory, ModelInfo, Sampled, Work
from common.kv.layout import KvLayout
from kvbaton.sampling import SamplingParams

_BLOCK_SIZES = {"cpu": 16, "cuda": 64}
_SCORED_AT_ONCE = 64  # the logits of a long chunk would take more memory than its KV


class TorchEngine:
    """Implements work.Engine. step computes on the engine's thread, step_sync on the caller's.

    This one computes on the CPU, in the arena itself; cuda/engine.py derives another from it.
    """

    device_memory: DeviceMemory | None = None
    full_step_tokens = 64  # the weights, read once for all of them, are an eighth of the time

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str = "auto",
        threads: int = 1,
        batch_invariant: bool = False,
        block_size: int | None = None,
        max_model_len: int | None = None,
        device: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
    ) -> None:
        """Load the model of a Hugging Face folder.

        `dtype` auto is the checkpoint's, but float32 for float16, of which CPUs have no fast kind.
        `device` is cpu, and auto means it too; loading.py chooses among devices. `attention` is one
        of attention.BACKENDS; with torch no code of our own is compiled. `quantization` int8 keeps
        the matrices in 8 bits, w8a8_int8 also what they are multiplied with, and `kv_cache_dtype`
        int8 the KV, of which auto keeps what was computed: see quantization.py. Raises ModelError
        for a folder or settings that cannot be served.
        """
        self.arithmetic_s = 0.0
        self._device = self._choose_device(device, attention)
        _check_settings(threads, block_size)
        _check_choice("quantization", quantization, QUANTIZATIONS)
        _check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
        torch.set_num_threads(threads)
        config = load_config(model_dir)
        length = config.max_position_embeddings if max_model_len is None else max_model_len
        if not 1 <= length <= config.max_position_embeddings:
            raise ModelError(
                f"{model_dir}: max_model_len must be from 1 to the model's max_position_embeddings "
                f"{config.max_position_embeddings}, got {length}"
            )
        computed = _dtype(dtype, config)
        layout = KvLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=_BLOCK_SIZES[self._device.type] if block_size is None else block_size,
            dtype=computed if kv_cache_dtype == "auto" else kv_cache_dtype,
        )
        checkpoint = Checkpoint(model_dir, config, self._device)
        self.model = self._make_model(
            ModelPlan(
                attention,
                config,
                checkpoint,
                TORCH_DTYPES[computed],
                layout.block_size,
                length,
                batch_invariant,
                quantization,
            )
        )
        arithmetic = _arithmetic(self.model.name) if batch_invariant else ""
        if quantization != "none":
            arithmetic = f"{quantization} {arithmetic}"
        if kv_cache_dtype != "auto":
            arithmetic = f"{computed} as {kv_cache_dtype} {arithmetic}"
        self.info = ModelInfo(
            fingerprint=fingerprint(model_dir, checkpoint.entries, layout, arithmetic),
            max_model_len=length,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            layout=layout,
        )
        self._grammars = Grammars(model_dir, config.eos_token_ids)
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._cache: KvCache | None = None
        self._thread = StepThread("engine", partial(torch.set_num_threads, threads))

    def _choose_device(self, device: str, attention: str) -> torch.device:
        if device not in ("auto", "cpu"):
            raise ModelError(f"device {device!r} is not supported; use cpu")
        if attention == "xformers":
            raise ModelError("attention 'xformers' needs device cuda; use auto")
        return torch.device("cpu")

    def _make_model(self, plan: ModelPlan) -> Forward:
        return make_model(plan)

    def attach(self, arena: memoryview) -> None:
        """Use `arena` as the KV memory, in place. Raises ValueError unless it is whole blocks."""
        self._cache = KvCache(self.info.layout, arena)

    async def prepare(self, sampling: SamplingParams) -> None:
        """Compile the grammar, if there is one, on a thread of its own. See work.Engine."""
        if sampling.grammar:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compiler, self._grammars.prepare, sampling.grammar)

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        """step_sync on the engine's thread; one step at a time, exceptions come back here."""
        return await self._thread.run(self.step_sync, works)

    def step_sync(self, works: Sequence[Work]) -> list[Sampled | None]:
        """Run one step: see work.Engine. Raises sampler.NumericalError on logits that are NaN."""
        if not works:
            return []
        with torch.inference_mode():
            logits = self._logits(works)
        drawn = iter(self._draw(logits, [work for work in works if work.sample]))
        return [next(drawn) if work.sample else None for work in works]

    def close(self) -> None:
        """Wait for the step that runs, stop the thread and let go of the arena."""
        self._thread.close()
        self._compiler.shutdown(cancel_futures=True)
        self._cache = None

    def _logits(self, works: Sequence[Work]) -> torch.Tensor:
        """Compute the step; the logits of the rows that are sampled, [rows, vocab_size] in fp32."""
        hidden, step = self._forward(works)
        self._score(works, hidden)
        return self._compute(self.model.logits, hidden, step.sample_rows)

    def _compute(self, part: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """part(*inputs) of the model; how long it takes is counted."""
        begun = time.perf_counter()
        computed = part(*inputs)
        self.arithmetic_s += time.perf_counter() - begun
        return computed

    def _draw(self, logits: torch.Tensor, works: Sequence[Work]) -> list[Sampled | None]:
        return sample(logits.numpy(), works, self.info.eos_token_ids, self._grammars)

    def _forward(self, works: Sequence[Work]) -> tuple[torch.Tensor, StepInput]:
        """Write the works' KV; what Model.forward gave for their positions, one after another."""
        assert self._cache is not None, "attach an arena first"
        step, batch = self._prepare(works, self._cache.num_blocks)
        return self._compute(self.model.forward, step, batch, self._cache), step

    def _score(self, works: Sequence[Work], hidden: torch.Tensor) -> None:
        """Set the scores of the works that want them."""
        first_row = 0
        for work in works:
            if work.prompt_logprobs is not None:
                scores = self._scores(work, hidden[first_row:], work.prompt_logprobs)
                work.scores = b"".join(scores)
            first_row += work.num_tokens

    def _scores(self, work: Work, hidden: torch.Tensor, count: int) -> Iterator[bytes]:
        """Of one work, whose rows come first in `hidden`; a few rows have logits at a time."""
        for begin in range(0, work.num_scored, _SCORED_AT_ONCE):
            end = min(begin + _SCORED_AT_ONCE, work.num_scored)
            rows = torch.arange(begin, end, device=hidden.device)
            logits = self._compute(self.model.logits, hidden, rows)
            following = work.tokens[work.start + begin + 1 : work.start + end + 1]
            yield score(logits.cpu().numpy(), following, count)

    def _prepare(self, works: Sequence[Work], num_blocks: int) -> tuple[StepInput, Batch]:
        """Index tensors of a step, built over all works at once."""
        size = self.info.layout.block_size
        used = [-(-work.end // size) for work in works]
        self._check(works, used)
        tables: Int32Array = np.zeros((len(works), max(used)), dtype=np.int32)
        for row, work, num_used in zip(tables, works, used, strict=True):
            row[:num_used] = work.slots[:num_used]
        assert tables.min() >= 0
        assert tables.max() < num_blocks
        starts = np.array([work.start for work in works])
        counts = np.array([work.num_tokens for work in works])
        tables = self._locate(tables, starts, starts + counts)
        row_starts = [0]
        tokens: list[int] = []
        positions: list[int] = []
        for work in works:
            tokens += work.tokens[work.start : work.end]
            positions += range(work.start, work.end)
            row_starts.append(len(positions))
        total = len(positions)
        padding = [0] * (self.model.num_rows(total) - total)
        owners, places = np.repeat(np.arange(len(works)), counts), np.array(positions)
        last_rows = [
            end - 1 for end, work in zip(row_starts[1:], works, strict=True) if work.sample
        ]
        step = StepInput(
            num_tokens=total,
            tokens=_tensor(tokens + padding),
            positions=_tensor(positions + padding),
            slots=torch.from_numpy(tables[owners, places // size].astype(np.int64)),
            offsets=torch.from_numpy(places % size),
            sample_rows=_tensor(last_rows),
        )
        return step, Batch(np.array(row_starts, np.int32), starts.astype(np.int32), tables)

    def _locate(
        self,
        tables: Int32Array,
        starts: np.ndarray,  # noqa: ARG002 - decides what a device has to be given
        ends: np.ndarray,  # noqa: ARG002
    ) -> Int32Array:
        """Where the blocks in these tables are for the step: where the arena has them."""
        return tables

    def _check(self, works: Sequence[Work], used: Sequence[int]) -> None:
        """Invariants of the scheduler: a violation is a defect there, not a bad request."""
        for work, num_used in zip(works, used, strict=True):
            assert work.num_tokens > 0
            assert 0 <= work.start < work.end <= min(len(work.tokens), self.info.max_model_len)
            assert len(work.slots) >= num_used
            assert not work.sample or work.end == len(work.tokens)


def _tensor(numbers: list[int]) -> torch.Tensor:
    """In int64; sooner than by torch.tensor."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def _check_settings(threads: int, block_size: int | None) -> None:
    if threads < 1:
        raise ModelError(f"threads must be at least 1, got {threads}")
    if block_size is not None and block_size < 1:
        raise ModelError(f"block_size must be at least 1, got {block_size}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ModelError(f"{name} {value!r} is not supported; use {' or '.join(choices)}")


def _arithmetic(model: str) -> str:
    """Whatever a row's bits depend on in batch-invariant mode: workers must agree on all of it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} torch {torch.__version__} {capability}"


def _dtype(dtype: str, config: ModelConfig) -> str:
    if dtype == "auto":
        return "float32" if config.dtype == "float16" else config.dtype
    if dtype not in ("bfloat16", "float32"):
        raise ModelError(f"dtype {dtype!r} is not supported on a CPU; use bfloat16 or float32")
    return dtype
