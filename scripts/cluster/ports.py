"""Which ports a cluster's processes take: all follow from its HTTP port. Pure.

Clusters whose HTTP ports differ by less than NUM_PLACES share no port, and no port lies where Linux
picks ports for outgoing connections. docs/decisions/ports.md says why.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_HTTP_PORT = 8000
MAX_GATEWAYS = 15
MAX_STORES = 12

_CLIENTS = 5555
_STORES = 5570
_PLACE_WIDTH = 40
NUM_PLACES = 680
# Where a role's ports with metrics begin, above the base, and how many there are.
_METRICS = {"gateway": (0, 20), "kvstore": (20, 20), "prefill": (40, 100), "decode": (140, 100)}
_MAX_METRICS_BASE = 65535 - 240


class ClusterError(ValueError):
    """A cluster that cannot be run as asked; the message names the setting and the limit."""


class StorePorts(NamedTuple):
    """One store's ports: its control messages, and the bytes of its blocks."""

    control: int
    data: int


def _shift(http_port: int) -> int:
    if not 1 <= http_port <= 65535:
        raise ClusterError(f"KVBATON_HTTP_PORT must be from 1 to 65535, got {http_port}")
    return _PLACE_WIDTH * ((http_port - DEFAULT_HTTP_PORT) % NUM_PLACES)


def client_port(http_port: int, instance: int) -> int:
    """Where msgpack clients of gateway number `instance` (from 1) connect. Raises ClusterError."""
    if not 1 <= instance <= MAX_GATEWAYS:
        raise ClusterError(
            f"a host runs gateway.1 to gateway.{MAX_GATEWAYS}, got number {instance}"
        )
    return _CLIENTS + _shift(http_port) + instance - 1


def store_ports(http_port: int, instance: int) -> StorePorts:
    """The ports of KV store number `instance` (from 1). Raises ClusterError."""
    if not 1 <= instance <= MAX_STORES:
        raise ClusterError(f"a host runs kvstore.1 to kvstore.{MAX_STORES}, got number {instance}")
    control = _STORES + _shift(http_port) + 2 * (instance - 1)
    return StorePorts(control, control + 1)


def metrics_port(base: int, role: str, instance: int) -> int:
    """Where process number `instance` (from 1) of a role shows its metrics. Raises ClusterError."""
    if not 1 <= base <= _MAX_METRICS_BASE:
        raise ClusterError(
            f"KVBATON_METRICS_BASE must be from 1 to {_MAX_METRICS_BASE}, got {base}"
        )
    first, most = _METRICS[role]
    if instance > most:
        raise ClusterError(
            f"KVBATON_METRICS_BASE gives ports to {role}.1 to {role}.{most}, got number {instance}"
        )
    return base + first + instance - 1


def cluster_ports(http_port: int, num_gateways: int, num_stores: int) -> dict[int, str]:
    """Every port the cluster listens on and what for. Raises ClusterError, also when two are equal:
    a few HTTP ports, such as 8062 with seven stores, are one of the ports they lead to."""
    ports = {http_port: "HTTP"}
    for instance in range(1, num_gateways + 1):
        _add(ports, client_port(http_port, instance), f"clients of gateway.{instance}")
    for instance in range(1, num_stores + 1):
        store = store_ports(http_port, instance)
        _add(ports, store.control, f"control of kvstore.{instance}")
        _add(ports, store.data, f"blocks of kvstore.{instance}")
    return ports


def _add(ports: dict[int, str], port: int, use: str) -> None:
    if port in ports:
        raise ClusterError(f"HTTP port {port} is also the port for {use}: choose another HTTP port")
    ports[port] = use
