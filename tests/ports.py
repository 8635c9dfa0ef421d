"""Ports for processes that tests start."""

from __future__ import annotations

import random
import socket

# Below what Linux gives to outgoing connections (net.ipv4.ip_local_port_range): a port that is free
# now is not taken by one of those in the moment before the process that is to have it binds it.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """A loopback port that nobody listens on, drawn so that test runs side by side do not meet."""
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among 200")


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
