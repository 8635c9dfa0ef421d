"""Servers to load, by what the command line calls them.

Targets are kvbaton and kvbaton-colocated, url=ADDRESS, command=COMMAND (with {port}, {model} and
{cores} in it), and those of peers.py. kvbaton's may go on with settings of its services, such as
kvbaton:gateway.max_local_tokens=0,decode.max_num_seqs=32; worker is both prefill and decode.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from scripts.benchmarks.clusters import kvbaton_server, service_settings
from scripts.benchmarks.peers import PEERS
from scripts.benchmarks.servers import Server, Setting, command_server, served_model

_OURS = ("kvbaton", "kvbaton-colocated")


def server(target: str, setting: Setting) -> AbstractContextManager[Server]:
    """Starts a target when it is entered, and stops it at the end.

    Raises ValueError for a target that is none, and, then or when entered, RuntimeError or OSError
    for one that does not serve.
    """
    name, _, rest = target.partition("=")
    kind, _, options = target.partition(":")
    if name == "url":
        url = rest.rstrip("/")
        return nullcontext(Server(url, served_model(url)))
    if name == "command":
        return command_server(rest, setting)
    if kind in _OURS:
        settings = service_settings(options)
        return kvbaton_server(setting, settings, is_colocated=kind != "kvbaton")
    if kind in PEERS:
        return PEERS[kind](options, setting)
    raise ValueError(
        f"target is {target!r}: it must be url=..., command=..., or begin with one of "
        f"{', '.join((*_OURS, *PEERS))}"
    )
