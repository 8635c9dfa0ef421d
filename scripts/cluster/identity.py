"""Who a process of the cluster is: its name, and the settings that follow from it. Pure.

honcho gives each process HONCHO_PROCESS_NAME, such as decode.2. Its PORT is not used: it depends on
the order of the Procfile and cannot be known by the other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.cluster.ports import (
    DEFAULT_HTTP_PORT,
    MAX_STORES,
    ClusterError,
    client_port,
    metrics_port,
    store_ports,
)

ROOT = Path(__file__).resolve().parents[2]
KEYS_VARIABLE = "KVBATON_KEYS"
INSECURE_VARIABLE = "KVBATON_INSECURE"
METRICS_VARIABLE = "KVBATON_METRICS_BASE"
KEYS_FOLDER = ROOT / ".run" / "keys"  # of the clusters of this checkout, unless another is named
ROLES = ("gateway", "kvstore", "prefill", "decode")


class Identity(NamedTuple):
    """One process of the cluster; `instance` counts from 1 within its role."""

    role: str
    name: str
    instance: int


def identify(role: str, environ: Mapping[str, str]) -> Identity:
    """The process as honcho named it, or the first of its role. Raises ClusterError."""
    if role not in ROLES:
        raise ClusterError(f"the role must be one of {', '.join(ROLES)}, got {role!r}")
    name = environ.get("HONCHO_PROCESS_NAME", f"{role}.1")
    number = name.rpartition(".")[2]
    if not number.isdecimal() or int(number) < 1:
        raise ClusterError(f"HONCHO_PROCESS_NAME must be like {role}.1, got {name!r}")
    return Identity(role, name, int(number))


def service_settings(identity: Identity, environ: Mapping[str, str]) -> dict[str, str]:
    """The KVBATON_* and other variables that `identity` runs with, without those that `environ`
    already sets: what the user says wins. Raises ClusterError."""
    http_port = http_port_of(environ)
    settings = {"KVBATON_NAME": identity.name}
    if folder := keys_folder(environ):
        settings[KEYS_VARIABLE] = str(folder)
    if identity.role == "kvstore":
        _check_store_is_used(identity, environ)
        ports = store_ports(http_port, identity.instance)
        settings["KVBATON_BIND"] = f"tcp://127.0.0.1:{ports.control}"
        settings["KVBATON_DATA_BIND"] = f"tcp://127.0.0.1:{ports.data}"
    else:
        settings["KVBATON_STORES"] = ",".join(
            f"tcp://127.0.0.1:{store_ports(http_port, number).control}"
            for number in range(1, num_stores_of(environ) + 1)
        )
    if identity.role == "gateway":
        settings["KVBATON_HTTP_PORT"] = str(http_port)
        port = client_port(http_port, identity.instance)
        settings["KVBATON_BIND"] = f"tcp://127.0.0.1:{port}"
    if METRICS_VARIABLE in environ:
        base = _number(environ, METRICS_VARIABLE, 0)
        port = metrics_port(base, identity.role, identity.instance)
        settings["KVBATON_METRICS_PORT"] = str(port)
    if identity.role in ("prefill", "decode"):
        # OpenMP threads that spin take the cores of the neighbouring processes.
        settings["OMP_WAIT_POLICY"] = "passive"
        settings["OMP_NUM_THREADS"] = environ.get("KVBATON_THREADS", "1")
    return {key: value for key, value in settings.items() if key not in environ}


def http_port_of(environ: Mapping[str, str]) -> int:
    """KVBATON_HTTP_PORT. Raises ClusterError unless it is a number; ports.py checks its range."""
    return _number(environ, "KVBATON_HTTP_PORT", DEFAULT_HTTP_PORT)


def num_stores_of(environ: Mapping[str, str]) -> int:
    """KVBATON_KVSTORES: how many KV stores the cluster has. Raises ClusterError."""
    num_stores = _number(environ, "KVBATON_KVSTORES", 1)
    if not 1 <= num_stores <= MAX_STORES:
        raise ClusterError(f"KVBATON_KVSTORES must be from 1 to {MAX_STORES}, got {num_stores}")
    return num_stores


def keys_folder(environ: Mapping[str, str]) -> Path | None:
    """Where the keys of a cluster with this environment are; None if it runs without. Services run
    in the folder of the checkout. Raises ClusterError."""
    insecure = environ.get(INSECURE_VARIABLE, "false").lower()
    if insecure not in ("1", "true", "0", "false"):
        raise ClusterError(f"{INSECURE_VARIABLE} must be true or false, got {insecure!r}")
    if insecure in ("1", "true"):
        return None
    return ROOT / environ.get(KEYS_VARIABLE, str(KEYS_FOLDER))


def _check_store_is_used(identity: Identity, environ: Mapping[str, str]) -> None:
    """Workers and gateways cannot ask honcho how many stores it started."""
    if "KVBATON_STORES" not in environ and identity.instance > num_stores_of(environ):
        raise ClusterError(
            f"nobody would use {identity.name}: set KVBATON_KVSTORES={identity.instance} as well"
        )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise ClusterError(f"{name} must be a whole number, got {text!r}")
    return int(text)
