"""Device memory mapped by another process on the same GPU: CUDA IPC.

By the runtime's and the driver's own functions (CUDA Runtime API, "cudaIpcGetMemHandle"), not by
torch.multiprocessing: that counts on one receiver for each time it is told of a tensor, and keeps
the count in files.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HANDLE_BYTES = 64
_OFFSET_BYTES = 8
_LAZY_PEER_ACCESS = 1  # the one flag there is, and it is required


class SharingError(Exception):
    """Device memory cannot be shared here; blocks go through the arena then."""


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Memory that torch is to take as it is (CUDA Array Interface, version 3)."""

    address: int
    num_bytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


class CudaIpc:
    """Implements neighbours.Sharing. `device` is the GPU's UUID."""

    def __init__(self, device: torch.device) -> None:
        """Raises SharingError where CUDA's libraries are not to be had."""
        self.device = str(torch.cuda.get_device_properties(device).uuid)
        self._runtime, self._driver = _libraries()
        self._bases: dict[int, ctypes.c_void_p] = {}  # what was mapped, by where a pool is in it

    def export(self, memory: Tensor) -> bytes:
        """What `open` takes, for as long as `memory` is there. Raises SharingError, such as where
        the allocator's memory has no handle (expandable segments, cudaMallocAsync)."""
        base, handle = ctypes.c_uint64(), _Handle()
        status = self._driver.cuMemGetAddressRange_v2(
            ctypes.byref(base), None, ctypes.c_uint64(memory.data_ptr())
        )
        if status:
            raise SharingError(f"the driver does not know the pool's memory (error {status})")
        address = ctypes.c_void_p(memory.data_ptr())
        self._check(self._runtime.cudaIpcGetMemHandle(ctypes.byref(handle), address))
        offset = memory.data_ptr() - base.value  # a handle is of the whole allocation
        return bytes(handle.reserved) + offset.to_bytes(_OFFSET_BYTES, "little")

    def open(self, handle: bytes, num_bytes: int) -> Tensor:
        """That memory, [num_bytes] in uint8, until `close`. Raises SharingError."""
        if len(handle) != _HANDLE_BYTES + _OFFSET_BYTES:
            raise SharingError(f"a handle of {len(handle)} bytes")
        base = ctypes.c_void_p()
        of_allocation = _Handle.from_buffer_copy(handle[:_HANDLE_BYTES])
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        status = self._runtime.cudaIpcOpenMemHandle(ctypes.byref(base), of_allocation, flags)
        self._check(status)
        address = (base.value or 0) + int.from_bytes(handle[_HANDLE_BYTES:], "little")
        self._bases[address] = base
        try:
            return torch.as_tensor(_Mapped(address, num_bytes), device="cuda")
        except RuntimeError as error:
            self._close(address)
            raise SharingError(str(error)) from error

    def close(self, memory: Tensor) -> None:
        """Let go of what `open` gave. The device keeps it until then, though its owner be gone."""
        self._close(memory.data_ptr())

    def _close(self, address: int) -> None:
        with suppress(SharingError):  # as where the driver has done so by itself
            self._check(self._runtime.cudaIpcCloseMemHandle(self._bases.pop(address)))

    def _check(self, status: int) -> None:
        if status:
            self._runtime.cudaGetLastError()  # else torch takes it for an error of its next kernel
            text = self._runtime.cudaGetErrorString(status)
            raise SharingError(f"CUDA says: {text.decode()} ({status})")


def _libraries() -> tuple[Any, Any]:
    """The runtime that torch has loaded, and the driver."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        runtime, driver = ctypes.CDLL(f"libcudart.so.{major}"), ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SharingError(str(error)) from error
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime, driver
