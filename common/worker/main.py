"""What a worker's process is made of: the engine that its settings name, and its runtime."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import uvloop

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
        quantization=config.quantization,
        threads=config.threads,
        batch_invariant=config.batch_invariant,
    )


def worker_main(role_name: str, make_role: Callable[[WorkerRuntime], Role]) -> NoReturn:
    """The life of a worker's process."""
    keep_large_frames()
    config = load_config(WorkerConfig, f"python -m services.{role_name}")
    main = serve(
        config.name,
        config.log_level,
        Access(role_name, config.keys, config.insecure, [config.bind]),
        lambda seams: WorkerRuntime(config, role_name, seams, make_engine, make_role),
    )
    status = uvloop.run(main)
    # All is released by now. Python and torch would take a second of CPU to take themselves apart,
    # which a busy machine has not within the five that honcho waits.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
