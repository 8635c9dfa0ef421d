"""Finds out how a host is: each function looks at one thing. What it means is checks.py."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.host.facts import (
    UNLIMITED,
    Arena,
    Bind,
    Clock,
    Facts,
    KeyFile,
    Model,
    Nixl,
    StoreAnswer,
    Torch,
)

Settings = Mapping[str, str]
Instances = list[tuple[str, str, dict[str, str]]]  # role, name, settings

_FOR_ALL = ("pyzmq", "msgpack", "msgspec", "structlog", "prometheus-client", "uvloop", "xxhash")
_FOR = {
    "gateway": ("starlette", "uvicorn", "httptools", "tokenizers", "jinja2", "llguidance"),
    "kvstore": (),
    "prefill": ("torch", "numpy", "safetensors", "llguidance", "tokenizers"),
    "decode": ("torch", "numpy", "safetensors", "llguidance", "tokenizers"),
}
_NIXL_DEVICES = "KVBATON_NIXL_DEVICES"
_STA_UNSYNC = 0x40  # timex.h


def gather(roles: tuple[str, ...], instances: Instances, *, load_model: bool) -> Facts:
    """All facts that matter for the roles of this host."""
    all_settings = [settings for _, _, settings in instances]
    workers = [each for each in instances if each[0] in ("prefill", "decode")]
    has_nvidia = Path("/proc/driver/nvidia").exists()
    torch = _torch() if workers else None
    model = _model(workers, load=load_model and torch is not None and not torch.error)
    files, locked = resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK
    return Facts(
        roles=roles,
        python=(sys.version_info.major, sys.version_info.minor),
        machine=platform.machine(),
        cpu_flags=_cpu_flags(),
        num_cores=len(os.sched_getaffinity(0)),
        num_threads=sum(_number(each[2].get("KVBATON_THREADS", "1")) for each in workers),
        packages={name: _version(name) for role in roles for name in (*_FOR_ALL, *_FOR[role])},
        torch=torch,
        has_nvidia=has_nvidia,
        xformers=_xformers() if workers and has_nvidia else None,
        compiler=shutil.which("g++") or shutil.which("c++") or "",
        nixl=_nixl(all_settings),
        arenas=tuple(_arena(settings) for role, _, settings in instances if role == "kvstore"),
        num_files=_limit(files),
        locked_bytes=_limit(locked),
        keys=_keys(roles, all_settings[0] if all_settings else {}),
        clock=_clock(),
        binds=tuple(bind for each in instances for bind in _binds(*each)),
        stores=_stores(instances, model),
        model=model,
        unknown=_unknown(all_settings),
    )


def _unknown(all_settings: list[dict[str, str]]) -> tuple[str, ...]:
    """Without the packages nobody knows the settings."""
    try:
        from scripts.cluster.config_file import unknown_variables

        return tuple(unknown_variables({name: "" for each in all_settings for name in each}))
    except ImportError:
        return ()


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 1


def _limit(kind: int) -> int:
    soft = resource.getrlimit(kind)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nixl(all_settings: list[dict[str, str]]) -> Nixl | None:
    named = {name for each in all_settings for name in _devices(each.get(_NIXL_DEVICES, ""))}
    if not named:
        return None
    version = next(filter(None, map(_version, ("nixl-cu12", "nixl-cu13"))), "")
    kinds = (Path("/sys/class/net"), Path("/sys/class/infiniband"))
    there = {each.name for kind in kinds if kind.exists() for each in kind.iterdir()}
    return Nixl(version, tuple(sorted(named - there)))


def _devices(text: str) -> list[str]:
    """Their names, without ports: `mlx5_0:1,eth0`."""
    names = [each.partition(":")[0].strip() for each in text.split(",")]
    return [name for name in names if name and name != "all"]


# ---- engine -------------------------------------------------------------------------------------


def _cpu_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _torch() -> Torch:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Torch(error=str(error))
    capability = torch.backends.cpu.get_cpu_capability()
    return Torch(torch.__version__, torch.version.cuda or "", capability)


def _xformers() -> str | None:
    """Why xformers has no kernels here, "" if it has; None if it is not installed."""
    if not _version("xformers"):
        return None
    try:
        from common.engine.attention.xformers import _load_fmha

        _load_fmha()
    except Exception as error:  # whatever a wheel for another torch may raise
        return str(error) or type(error).__name__
    return ""


def _model(workers: Instances, *, load: bool) -> Model | None:
    if not workers:
        return None
    folder = workers[0][2].get("KVBATON_MODEL", "models/demo")
    if not (Path(folder) / "config.json").is_file():
        return Model(folder, error="there is no config.json in it")
    if not load:
        return Model(folder)
    from common.config import load_config
    from common.worker.config import WorkerConfig
    from common.worker.main import make_engine

    try:
        config = load_config(WorkerConfig, workers[0][0], [], workers[0][2])
        engine = asyncio.run(make_engine(config))
    except SystemExit:
        return Model(folder, error="the worker's settings are wrong, as said above")
    except Exception as error:  # whatever an engine may raise
        return Model(folder, error=str(error) or type(error).__name__)
    info = engine.info
    engine.close()
    return Model(folder, fingerprint=info.fingerprint, layout=info.layout)


# ---- host ---------------------------------------------------------------------------------------


def _arena(settings: Settings) -> Arena:
    from common.config import parse_bytes

    folder = Path(settings.get("KVBATON_ARENA_DIR", "/dev/shm"))  # noqa: S108 the default
    wanted = parse_bytes(settings.get("KVBATON_KV_BYTES", "256M"))
    if not folder.is_dir():
        return Arena(str(folder), wanted, None)
    stats = os.statvfs(folder)
    ours = sum(path.stat().st_size for path in folder.glob("kvbaton-arena-*"))
    return Arena(str(folder), wanted, stats.f_bavail * stats.f_frsize + ours)


def _keys(roles: tuple[str, ...], settings: Settings) -> tuple[KeyFile, ...]:
    if settings.get("KVBATON_INSECURE", "false").lower() in ("1", "true"):
        return ()
    folder = Path(settings.get("KVBATON_KEYS", "/etc/kvbaton/keys"))
    wanted = [(folder, False)]
    if folder.is_dir():
        wanted += [(folder / "public.json", False)]
        wanted += [(folder / f"{role}.key", True) for role in roles]
    return tuple(_key(path, is_secret) for path, is_secret in wanted)


def _key(path: Path, is_secret: bool) -> KeyFile:
    try:
        return KeyFile(str(path), path.stat().st_mode & 0o777, is_secret)
    except OSError as error:
        return KeyFile(str(path), None, is_secret, error.strerror or str(error))


class _Timex(ctypes.Structure):
    """The head of struct timex; the kernel writes more behind it."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),  # us
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    )


def _clock() -> Clock:
    """What the kernel knows of who sets its clock, adjtimex(2)."""
    timex = _Timex()
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    except (AttributeError, OSError):
        return Clock()
    if state < 0:
        return Clock()
    return Clock(not timex.status & _STA_UNSYNC, timex.maxerror / 1e6)


# ---- cluster ------------------------------------------------------------------------------------


def _binds(role: str, name: str, settings: Settings) -> list[Bind]:
    endpoints = [settings.get("KVBATON_BIND", "")]
    if role == "kvstore":
        endpoints.append(settings.get("KVBATON_DATA_BIND", ""))
    binds = [_bind(name, each.removeprefix("tcp://")) for each in endpoints if each]
    if port := settings.get("KVBATON_METRICS_PORT", ""):
        binds.append(_bind(f"metrics of {name}", f"127.0.0.1:{port}"))
    return binds


def _bind(owner: str, address: str) -> Bind:
    host, _, port_text = address.rpartition(":")
    port = int(port_text) if port_text.isdecimal() else 0  # "*": a free one
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except OSError as error:
            return Bind(owner, host, port, error.strerror or str(error))
    return Bind(owner, host, port)


def _stores(instances: Instances, model: Model | None) -> tuple[StoreAnswer, ...]:
    """One member of each kind asks: their keys differ. Without the packages nobody can."""
    try:
        from scripts.host.ask_store import ask_store
    except ImportError:
        return ()
    asked: dict[tuple[str, str], StoreAnswer] = {}
    for role, _, settings in instances:
        if role == "kvstore":
            continue
        is_insecure = settings.get("KVBATON_INSECURE", "false").lower() in ("1", "true")
        keys = None if is_insecure else Path(settings.get("KVBATON_KEYS", "/etc/kvbaton/keys"))
        own = model if model and model.fingerprint and role != "gateway" else None
        for endpoint in settings.get("KVBATON_STORES", "tcp://127.0.0.1:5570").split(","):
            if (role, endpoint) not in asked:
                asked[role, endpoint] = ask_store(
                    endpoint,
                    role,
                    keys,
                    own.fingerprint if own else "",
                    own.layout if own else None,
                )
    return tuple(asked.values())
