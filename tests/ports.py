"""Ports for processes that tests start."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

from scripts.cluster.ports import cluster_ports

# Below what Linux gives to outgoing connections (net.ipv4.ip_local_port_range): a port that is free
# now is not taken by one of those in the moment before the process that is to have it binds it.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """A loopback port that nobody listens on, drawn so that test runs side by side do not meet."""
    return next(port for port in _drawn() if _is_free(port))


def free_cluster_port() -> int:
    """An HTTP port whose cluster, of one gateway and one store, has all the ports it leads to."""
    return next(port for port in _drawn() if all(map(_is_free, cluster_ports(port, 1, 1))))


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _drawn() -> Iterator[int]:
    yield from random.SystemRandom().sample(_PORTS, 200)
    raise OSError("no free port among 200")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
