"""Blocks copied between the arena and a pool of device memory, and the arena's pages pinned."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import structlog
import torch
from torch import Tensor

from common.engine.cuda.residency import Copies, IntArray
from common.engine.kv_cache import TORCH_DTYPES, KvCache
from common.kv.layout import KvLayout

log = structlog.get_logger()


class DevicePool(KvCache):
    """KV in device memory: `blocks` as in KvCache, laid out so that one layer's keys are one run of
    rows, as attention kernels want them (attention/xformers.py)."""

    def __init__(self, layout: KvLayout, memory: Tensor) -> None:
        """A pool in all of `memory` [bytes] in uint8."""
        self.layout = layout
        self.memory = memory
        pool = memory.view(TORCH_DTYPES[layout.dtype]).view(
            layout.num_layers, 2, -1, layout.block_size, layout.num_kv_heads, layout.head_dim
        )
        self.blocks = pool.permute(2, 0, 1, 4, 3, 5)

    @classmethod
    def of_zeros(cls, layout: KvLayout, num_blocks: int, device: torch.device) -> DevicePool:
        """So what attention reads beyond a sequence's end, and masks, is never NaN."""
        num_bytes = num_blocks * layout.block_bytes
        return cls(layout, torch.zeros(num_bytes, dtype=torch.uint8, device=device))


class Copier:
    """Copies whole blocks, on a stream of its own each way; a copy is done when the call returns.

    `arena` and `pool` are both [blocks, num_layers, 2, num_kv_heads, block_size, head_dim]. A block
    crosses as the one run of bytes that it is in the arena; the device changes the layout.
    """

    def __init__(self, arena: Tensor, pool: Tensor) -> None:
        self._arena = arena
        self._pool = pool
        self._in, self._out = (_stream(pool.device) for _ in range(2))

    def copy_in(self, copies: Copies) -> None:
        """Arena to pool."""
        with _on(self._in):
            for slot, block in zip(copies.slots, copies.blocks, strict=True):
                crossed = self._arena[slot].to(self._pool.device, non_blocking=True)
                self._pool[block].copy_(crossed)
        _wait(self._in)

    def copy_across(self, other: Tensor, theirs: IntArray, ours: IntArray) -> None:
        """Blocks `theirs` of another pool on the device to `ours` of this one."""
        with _on(self._in):
            for source, target in zip(theirs, ours, strict=True):
                self._pool[target].copy_(other[source], non_blocking=True)
        _wait(self._in)

    def copy_out(self, copies: Copies) -> None:
        """Pool to arena."""
        with _on(self._out):
            for slot, block in zip(copies.slots, copies.blocks, strict=True):
                self._arena[slot].copy_(self._pool[block].contiguous(), non_blocking=True)
        _wait(self._out)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


class PinnedPages:
    """Host memory that the device reads and writes by itself, without a copy by the CPU between.

    Pages stay pinned when other memory is mapped over them: they are released before that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: set[int] = set()

    def pin(self, memory: memoryview) -> None:
        """Where that is refused, copies are slower and the log says so."""
        if self._device.type != "cuda":
            return
        address = address_of(memory)
        try:
            torch.cuda.check_error(_runtime().cudaHostRegister(address, memory.nbytes, 0))
            self._pinned.add(address)
        except torch.cuda.CudaError as error:
            log.warning("arena_not_pinned", reason=str(error), using="pageable memory, slower")
            with suppress(RuntimeError):  # CUDA says it once more, to whoever asks next
                torch.zeros(1, device=self._device)

    def release(self, memory: memoryview) -> None:
        """No copy may be under way."""
        self._release(address_of(memory))

    def release_all(self) -> None:
        """The same for all."""
        for address in list(self._pinned):
            self._release(address)

    def _release(self, address: int) -> None:
        if address in self._pinned:
            self._pinned.remove(address)
            _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def address_of(memory: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
