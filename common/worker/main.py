"""What a worker's process is made of: the engine that its settings name, and its runtime."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import structlog
import uvloop

from common.config import StartError, load_config
from common.cpus import run_on
from common.engine.mock import MockEngine
from common.engine.work import Engine
from common.memory import keep_large_frames
from common.net.access import Access
from common.service import EXIT_MISCONFIGURED, serve
from common.worker.config import WorkerConfig
from common.worker.role import Role
from common.worker.runtime import WorkerRuntime
from common.worker.self_test import self_test

log = structlog.get_logger()


async def make_engine(config: WorkerConfig) -> Engine:
    """The engine the settings name, once it has given a token. torch is imported only when it is
    the one. Raises StartError."""
    engine: Engine
    if config.engine == "mock":
        engine = MockEngine(config.mock_step_ms / 1000, config.mock_token_ms / 1000)
    else:
        engine = await asyncio.to_thread(_load_engine, config)  # signals are served meanwhile
        log.info("model_loaded")
    await self_test(engine)
    log.info("self_test_passed")
    return engine


async def _make_lasting_engine(config: WorkerConfig) -> Engine:
    """make_engine without collections of garbage meanwhile. No later one looks at what is there by
    then: the 170,000 objects of torch alone would stop a step for 0.16 s."""
    gc.disable()
    try:
        engine = await make_engine(config)
    finally:
        gc.enable()
    gc.freeze()
    return engine


def _load_engine(config: WorkerConfig) -> Engine:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    from common.engine.loading import load_engine

    log.info("torch_imported")
    return load_engine(
        Path(config.model),
        device=config.device,
        device_kv_bytes=config.device_kv_bytes,
        cuda_ipc=config.cuda_ipc,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        threads=config.threads,
        batch_invariant=config.batch_invariant,
    )


def worker_main(role_name: str, make_role: Callable[[WorkerRuntime], Role]) -> NoReturn:
    """The life of a worker's process."""
    keep_large_frames()
    config = load_config(WorkerConfig, role_name)
    try:
        run_on(config.cpus)  # before the first thread is made: each takes the cores of its maker
    except StartError as error:
        print(f"services.{role_name}: {error}", file=sys.stderr)  # noqa: T201 - no log yet
        raise SystemExit(EXIT_MISCONFIGURED) from error
    main = serve(
        config.name,
        config.log_level,
        Access(role_name, config.keys, config.insecure, [config.bind]),
        lambda seams: WorkerRuntime(config, role_name, seams, _make_lasting_engine, make_role),
        config.drain_s,
        io_threads=config.data_connections,
    )
    status = uvloop.run(main)
    # All is released by now. Python and torch would take a second of CPU to take themselves apart,
    # which a busy machine has not within the five that honcho waits.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
