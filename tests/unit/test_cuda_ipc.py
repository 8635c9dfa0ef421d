"""What is asked of CUDA to share memory, with stand-ins for its libraries."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from common.engine.cuda import ipc
from common.engine.cuda.ipc import CudaIpc, SharingError

BASE = 0x7F0000000000
MEMORY = bytes(range(64))


class Tensor:
    """Of a memory that begins 512 bytes into an allocation."""

    def data_ptr(self) -> int:
        return BASE + 512


class Driver:
    def __init__(self) -> None:
        self.status = 0

    def cuMemGetAddressRange_v2(self, base: Any, _size: None, address: Any) -> int:  # noqa: N802
        base._obj.value = BASE
        assert address.value == BASE + 512
        return self.status


class Runtime:
    """Another process maps an allocation elsewhere."""

    MAPPED = 0x7E0000000000

    def __init__(self) -> None:
        self.status = 0
        self.last_error = 0
        self.closed: list[int] = []

    def _end(self) -> int:
        self.last_error = self.status
        return self.status

    def cudaIpcGetMemHandle(self, handle: Any, address: Any) -> int:  # noqa: N802
        assert address.value == BASE + 512
        ctypes.memmove(handle, MEMORY, len(MEMORY))
        return self._end()

    def cudaIpcOpenMemHandle(self, base: Any, handle: Any, flags: Any) -> int:  # noqa: N802
        assert bytes(handle.reserved) == MEMORY
        assert flags.value == 1
        base._obj.value = self.MAPPED
        return self._end()

    def cudaIpcCloseMemHandle(self, base: Any) -> int:  # noqa: N802
        self.closed.append(base.value)
        return self._end()

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.last_error = 0
        return 0

    def cudaGetErrorString(self, status: int) -> bytes:  # noqa: N802
        return f"number {status}".encode()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, Driver]:
    found = Runtime(), Driver()
    monkeypatch.setattr(ipc, "_libraries", lambda: found)
    properties = type("Properties", (), {"uuid": "the-gpu"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return found


@pytest.fixture
def sharing(libraries: tuple[Runtime, Driver]) -> CudaIpc:
    return CudaIpc(torch.device("cuda"))


def test_memory_is_found_within_what_was_mapped(
    sharing: CudaIpc, libraries: tuple[Runtime, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    class Mapped(Tensor):
        def data_ptr(self) -> int:
            return int(seen[0]["data"][0])

    def as_tensor(memory: Any, device: str) -> Mapped:
        assert device == "cuda"
        seen.append(memory.__cuda_array_interface__)
        return Mapped()

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    assert sharing.device == "the-gpu"
    handle = sharing.export(Tensor())  # type: ignore[arg-type]
    mapped = sharing.open(handle, 4096)
    assert seen[0]["shape"] == (4096,)
    assert seen[0]["typestr"] == "|u1"
    assert seen[0]["data"] == (Runtime.MAPPED + 512, False)
    sharing.close(mapped)
    assert libraries[0].closed == [Runtime.MAPPED]


def test_a_refusal_says_why_and_is_not_left_to_the_next_kernel(
    sharing: CudaIpc, libraries: tuple[Runtime, Driver]
) -> None:
    runtime, driver = libraries
    handle = sharing.export(Tensor())  # type: ignore[arg-type]
    runtime.status = 801
    for refused in (
        lambda: sharing.export(Tensor()),  # type: ignore[arg-type]
        lambda: sharing.open(handle, 4096),
    ):
        with pytest.raises(SharingError, match=r"number 801 \(801\)"):
            refused()
        assert runtime.last_error == 0
    driver.status = 1
    with pytest.raises(SharingError, match="error 1"):
        sharing.export(Tensor())  # type: ignore[arg-type]
    with pytest.raises(SharingError, match="a handle of 3 bytes"):
        sharing.open(b"abc", 4096)


def test_without_cuda_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "999.9")
    with pytest.raises(SharingError, match="libcudart"):
        ipc._libraries()
