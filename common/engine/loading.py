"""The engine for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.engine.runner import TorchEngine


def load_engine(
    model_dir: Path,
    *,
    device: str = "auto",
    device_kv_bytes: int = 0,
    cuda_ipc: bool = True,
    **options: Any,
) -> TorchEngine:
    """TorchEngine for a CPU, DeviceEngine for a GPU; auto means a GPU where torch finds one.

    `options` are those of both. Raises ModelError as they do.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return TorchEngine(model_dir, **options)
    from common.engine.cuda.engine import DeviceEngine

    return DeviceEngine(
        model_dir, device=device, device_kv_bytes=device_kv_bytes, cuda_ipc=cuda_ipc, **options
    )
