"""Where a process is reached, which may be another address than the one that it binds. Pure."""

from __future__ import annotations

import ipaddress
import re

from common.config import StartError

_NAME = re.compile(r"[\w.-]+")
_ENDPOINT = re.compile(r"tcp://(.+):[0-9]{1,5}")
_EVERYWHERE = ("0.0.0.0", "[::]", "*")  # noqa: S104 - what nobody can connect to


def advertised(bound: str, advertise: str) -> str:
    """The endpoint that others are told of: `advertise` is a host, a whole endpoint, or "" for the
    one that is `bound`. Raises StartError."""
    if not advertise:
        return bound
    whole = _ENDPOINT.fullmatch(advertise)
    host = whole[1] if whole else advertise
    if not _is_host(host):
        raise StartError(f"--advertise must be a host or tcp://HOST:PORT, got {advertise!r}")
    return advertise if whole else _with_host(bound, host)


def check_told(endpoint: str) -> str:
    """The endpoint, if others can connect to it. Raises StartError."""
    if _host_of(endpoint) in _EVERYWHERE:
        raise StartError(
            f"{endpoint} is every address of this host: --advertise HOST must say which one others "
            "use"
        )
    return endpoint


def reachable(told: str, through: str) -> str:
    """The endpoint that a peer tells of; where that is every address of its host, the one by which
    we have reached it, as in the endpoint `through`."""
    return _with_host(told, _host_of(through)) if _host_of(told) in _EVERYWHERE else told


def _is_host(host: str) -> bool:
    """A name, an IPv4 address, or an IPv6 address with or without brackets and a zone."""
    if ":" not in host:
        return bool(_NAME.fullmatch(host))
    try:
        ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _host_of(endpoint: str) -> str:
    return endpoint.partition("://")[2].rpartition(":")[0]


def _with_host(endpoint: str, host: str) -> str:
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"tcp://{host}:{endpoint.rpartition(':')[2]}"
