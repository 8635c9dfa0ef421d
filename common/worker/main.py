"""What a worker's process is made of: the engine that its settings name, and its runtime."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from common.config import load_config
from common.engine.mock import MockEngine
from common.engine.work import Engine
from common.memory import keep_large_frames
from common.net.access import Access
from common.service import serve
from common.worker.config import WorkerConfig
from common.worker.role import Role
from common.worker.runtime import WorkerRuntime


async def make_engine(config: WorkerConfig) -> Engine:
    """The engine the settings name. torch is imported only when it is the one."""
    if config.engine == "mock":
        return MockEngine(config.mock_step_ms / 1000, config.mock_token_ms / 1000)
    return await asyncio.to_thread(_load_engine, config)  # signals are served meanwhile


def _load_engine(config: WorkerConfig) -> Engine:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    from common.engine.runner import TorchEngine

    return TorchEngine(
        Path(config.model),
        dtype=config.dtype,
        threads=config.threads,
        batch_invariant=config.batch_invariant,
    )


def worker_main(
    role_name: str, make_role: Callable[[WorkerRuntime], Role]
) -> Coroutine[Any, Any, int]:
    """The life of a worker's process, to be run on an event loop."""
    keep_large_frames()
    config = load_config(WorkerConfig, f"python -m services.{role_name}")
    return serve(
        config.name,
        config.log_level,
        Access(role_name, config.keys, config.insecure, [config.bind]),
        lambda seams: WorkerRuntime(config, role_name, seams, make_engine, make_role),
    )
