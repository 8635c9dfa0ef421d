"""Settings of a prefill or decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ADVERTISE_HELP, INSECURE_HELP, KEYS_HELP, NIXL_HELP, setting
from common.metrics_port import HOST_HELP, PORT_HELP
from common.service import DRAIN_HELP, DRAIN_TIMEOUT_S


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of a prefill or decode worker."""

    name: str = setting("worker.1", "name shown to people, e.g. decode.2")
    model: str = setting("models/demo", "folder of the model")
    engine: str = setting("torch", "torch, or mock: no arithmetic", choices="torch mock")
    stores: str = setting("tcp://127.0.0.1:5570", "endpoints of the KV stores, comma-separated")
    bind: str = setting("tcp://127.0.0.1:*", "where gateways reach this worker")
    advertise: str = setting("", ADVERTISE_HELP)
    mover: str = setting("auto", "how KV blocks move", choices="auto shm zmq nixl")
    data_connections: int = setting(
        1, "connections for block bytes to each store, each encrypted by a thread of its own", low=1
    )
    kv_compression: str = setting(
        "off",
        "of KV that moves; auto: lossless where that is sooner; int8 changes what is computed",
        choices="off lossless auto int8",
    )
    dtype: str = setting("auto", "auto, bfloat16 or float32", choices="auto bfloat16 float32")
    device: str = setting("auto", "a GPU where there is one", choices="auto cpu cuda")
    device_kv_bytes: int = setting(
        0, "most that KV takes of a GPU's memory; 0: as much as the arenas, if it is free", low=0
    )
    cuda_ipc: bool = setting(
        True, "share KV in a GPU's memory with other workers there: read theirs, let them read ours"
    )
    quantization: str = setting(
        "none",
        "none; int8: smaller weights; w8a8_int8: activations too, faster where int8 products are",
        choices="none int8 w8a8_int8",
    )
    kv_cache_dtype: str = setting(
        "auto", "auto: as computed; or int8: smaller KV", choices="auto int8"
    )
    threads: int = setting(1, "compute threads", low=1)
    cpus: str = setting("", "cores to run on, such as 0-3,8; any unless given")
    batch_invariant: bool = setting(False, "bits of a request never depend on the batch")
    max_num_seqs: int = setting(64, "sequences held at once", low=1)
    max_num_batched_tokens: int = setting(512, "tokens computed in one step", low=1)
    max_waiting: int = setting(1024, "requests that may wait for a place", low=0)
    mock_step_ms: float = setting(5.0, "mock engine: time of a step", low=0)
    mock_token_ms: float = setting(0.05, "mock engine: time of a token in a step", low=0)
    drain_s: float = setting(DRAIN_TIMEOUT_S, DRAIN_HELP, low=0)
    metrics_host: str = setting("127.0.0.1", HOST_HELP)
    metrics_port: int = setting(0, PORT_HELP, low=0)
    nixl_devices: str = setting("", NIXL_HELP)
    keys: str = setting("", KEYS_HELP)
    insecure: bool = setting(False, INSECURE_HELP)
    log_level: str = setting("info", "log level", choices="debug info warning error")
