"""Settings of a KV store."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ADVERTISE_HELP, INSECURE_HELP, KEYS_HELP, NIXL_HELP, setting
from common.metrics_port import HOST_HELP, PORT_HELP


@dataclass(frozen=True)
class StoreConfig:
    """Settings of a KV store."""

    name: str = setting("kvstore.1", "name shown to people")
    bind: str = setting("tcp://127.0.0.1:5570", "where everyone reaches the store")
    data_bind: str = setting("tcp://127.0.0.1:5571", "where block bytes come and go")
    io_threads: int = setting(
        1, "threads that encrypt; workers' connections for block bytes share them", low=1
    )
    advertise: str = setting("", f"of --data-bind: {ADVERTISE_HELP}")
    kv_bytes: int = setting(256 << 20, "size of the KV arena, e.g. 2G", low=1)
    arena_dir: str = setting("/dev/shm", "folder of the KV arena")  # noqa: S108 - shared memory
    keep_arena: bool = setting(False, "leave the arena to the next start, not only after a crash")
    prefix_cache: bool = setting(True, "whether prompts reuse the blocks of earlier ones")
    disk_dir: str = setting("", "folder for blocks evicted from memory; none unless given")
    disk_bytes: int = setting(4 << 30, "most bytes to keep on disk, e.g. 20G", low=1)
    heartbeat_s: float = setting(2.0, "interval of heartbeats", low=0.01)
    lost_after_s: float = setting(8.0, "silence after which a member is lost", low=0.1)
    metrics_host: str = setting("127.0.0.1", HOST_HELP)
    metrics_port: int = setting(0, PORT_HELP, low=0)
    nixl_devices: str = setting("", NIXL_HELP)
    keys: str = setting("", KEYS_HELP)
    insecure: bool = setting(False, INSECURE_HELP)
    log_level: str = setting("info", "log level", choices="debug info warning error")
