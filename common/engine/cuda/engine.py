"""The engine on a GPU: TorchEngine with its KV in device memory and decode steps as CUDA graphs.

Made with device cpu it does the same in host memory, without graphs: that is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch

from common.engine.attention.base import AttentionBackend, AttentionShape, Batch, Int32Array
from common.engine.attention.gathered import GatheredAttention
from common.engine.attention.xformers import XformersAttention
from common.engine.config import ModelError
from common.engine.cuda.buckets import fits_a_graph
from common.engine.cuda.graphs import CudaCapture, DecodeGraphs
from common.engine.cuda.ipc import CudaIpc
from common.engine.cuda.layers import make_device_layers
from common.engine.cuda.memory import ArenaFollower
from common.engine.cuda.neighbours import Sharing
from common.engine.cuda.residency import IntArray, PoolFullError, Step
from common.engine.model import Model, ModelPlan, StepInput
from common.engine.runner import TorchEngine
from common.engine.sampler import check_finite, is_plain
from common.engine.work import Sampled, Work

log = structlog.get_logger()

_FREE_SHARE = 0.9  # of the device's free memory, if the pool could use more: steps need some too


class DeviceEngine(TorchEngine):
    """Implements work.Engine. `attention` is auto, xformers or torch (attention/gathered.py)."""

    model: Model
    full_step_tokens = 512  # DistServe, section 3.1: of a model of 13B parameters on an A100

    def __init__(
        self, model_dir: Path, *, device_kv_bytes: int = 0, cuda_ipc: bool = True, **options: Any
    ) -> None:
        """See TorchEngine. `device_kv_bytes` is the most that the pool may take; 0 means as much as
        the arena has, if it is free. With `cuda_ipc` what another process on the same GPU has in
        its memory is read there."""
        self._cuda_ipc = cuda_ipc
        self._device_kv_bytes = device_kv_bytes
        self._follower: ArenaFollower | None = None
        self._graphs: DecodeGraphs | None = None
        self._step: Step | None = None
        if options.get("batch_invariant"):
            raise ModelError("batch_invariant is not supported on CUDA; use device cpu")
        if options.get("kv_cache_dtype", "auto") != "auto":
            raise ModelError("kv_cache_dtype on CUDA can only be auto yet; use device cpu")
        super().__init__(model_dir, **options)

    def attach(self, arena: memoryview) -> None:
        """Make the pool that follows `arena`. Raises ValueError unless that is whole blocks, and
        ModelError where the device has no room."""
        self._detach()
        num_blocks = self._num_blocks(len(arena) // self.info.layout.block_bytes)
        follower = ArenaFollower(
            self.info.layout, arena, num_blocks, self._device, self._make_sharing()
        )
        log.info("device_pool", device=str(self._device), num_blocks=num_blocks)
        self._follower = self.device_memory = follower
        self._cache = follower.pool
        self._graphs = None
        attention = self.model.attention
        if self._device.type == "cuda" and isinstance(attention, XformersAttention):
            self._graphs = DecodeGraphs(self.model, attention, follower.pool, CudaCapture())

    def step_sync(self, works: Sequence[Work]) -> list[Sampled | None]:
        """See TorchEngine. A step that does not fit the pool is run in parts. Raises PoolFullError
        where one sequence alone does not."""
        try:
            return super().step_sync(works)
        except PoolFullError:
            if len(works) == 1:
                raise
        finally:
            self._end_step()
        half = len(works) // 2
        return self.step_sync(works[:half]) + self.step_sync(works[half:])

    def close(self) -> None:
        """See TorchEngine."""
        super().close()
        self._detach()

    def _detach(self) -> None:
        """Let go of the pool, if there is one."""
        if self._follower is not None:
            self._follower.close()
        self._follower = self.device_memory = self._graphs = self._cache = None

    def _choose_device(self, device: str, attention: str) -> torch.device:
        if attention not in ("auto", "xformers", "torch"):
            raise ModelError(f"attention {attention!r} is not for CUDA; use auto")
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelError("device 'cuda': torch finds no GPU here; use cpu")
        return torch.device(device)

    def _make_model(self, plan: ModelPlan) -> Model:
        config = plan.config
        shape = AttentionShape.of(config, plan.block_size)
        return Model(
            config,
            plan.checkpoint,
            plan.dtype,
            make_device_layers(config.rms_norm_eps, self._device),
            self._make_attention(plan.attention, shape, plan.dtype),
            max_model_len=plan.max_model_len,
            batch_invariant=plan.batch_invariant,
            quantization=plan.quantization,
        )

    def _make_attention(
        self, name: str, shape: AttentionShape, dtype: torch.dtype
    ) -> AttentionBackend:
        if name != "torch" and self._device.type == "cuda":
            try:
                if dtype is torch.float32:
                    raise ModelError("attention by xformers has no kernels for float32")
                return XformersAttention(shape)
            except ModelError as error:
                if name == "xformers":
                    raise
                log.warning("xformers_unavailable", reason=str(error), using="torch, slower")
        return GatheredAttention(shape, self._device)

    def _make_sharing(self) -> Callable[[], Sharing] | None:
        if self._device.type != "cuda" or not self._cuda_ipc:
            return None
        return partial(CudaIpc, self._device)

    def _num_blocks(self, num_slots: int) -> int:
        """Blocks of the pool for an arena of `num_slots`."""
        room = self._device_kv_bytes
        if not room and self._device.type == "cuda":
            room = int(torch.cuda.mem_get_info()[0] * _FREE_SHARE)
        if not room:
            return num_slots
        num_blocks = min(num_slots, room // self.info.layout.block_bytes)
        if num_blocks < 1:
            raise ModelError(
                f"device_kv_bytes must be at least a block of {self.info.layout.block_bytes} "
                f"bytes, got {room}"
            )
        return num_blocks

    # ---- a step -------------------------------------------------------------------------------

    def _locate(self, tables: Int32Array, starts: IntArray, ends: IntArray) -> Int32Array:
        assert self._follower is not None
        self._step = self._follower.begin_step(tables, starts, ends)
        return self._step.tables

    def _end_step(self) -> None:
        """Wait for the device, which may still be at it when nothing was sampled."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        step, self._step = self._step, None
        if step is not None:
            assert self._follower is not None
            self._follower.end_step(step)

    def _logits(self, works: Sequence[Work]) -> torch.Tensor:
        if self._graphs is None or not fits_a_graph(works):
            return super()._logits(works)
        return self._graphs.run(*self._prepared(works))

    def _compute(self, part: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """The device is only told what to do here, which is not counted."""
        return part(*inputs)

    def _forward(self, works: Sequence[Work]) -> tuple[torch.Tensor, StepInput]:
        step, batch = self._prepared(works)
        step = on_device(step, self._device)
        assert self._cache is not None
        return self.model.forward(step, batch, self._cache), step

    def _prepared(self, works: Sequence[Work]) -> tuple[StepInput, Batch]:
        """Index tensors, still on the CPU, in terms of the pool."""
        assert self._follower is not None, "attach an arena first"
        return self._prepare(works, self._follower.num_slots)

    def _draw(self, logits: torch.Tensor, works: Sequence[Work]) -> list[Sampled | None]:
        """Greedy rows are drawn on the device; the logits of the others come to the CPU."""
        if not works:
            return []
        best = logits.max(dim=-1)
        check_finite(best.values.cpu().numpy())
        drawn: list[Sampled | None] = [Sampled(token, 0.0) for token in best.indices.tolist()]
        others = [row for row, work in enumerate(works) if not is_plain(work)]
        if others:
            rows = logits[others].cpu()
            sampled = super()._draw(rows, [works[row] for row in others])
            for row, token in zip(others, sampled, strict=True):
                drawn[row] = token
        return drawn


def on_device(step: StepInput, device: torch.device) -> StepInput:
    """The same step with its tensors there."""
    names = ("tokens", "positions", "slots", "offsets", "sample_rows")
    return replace(step, **{name: getattr(step, name).to(device) for name in names})
