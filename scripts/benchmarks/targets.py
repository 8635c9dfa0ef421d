"""Servers to load, by what the command line calls them.

Targets are kvbaton and kvbaton-colocated, url=ADDRESS, command=COMMAND (with {port}, {model} and
{cores} in it), and those of peers.py. kvbaton's may go on with settings of its services, such as
kvbaton:gateway.max_local_tokens=0,decode.max_num_seqs=32; worker is both prefill and decode.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from scripts.benchmarks import engines
from scripts.benchmarks.clusters import kvbaton_server, service_settings
from scripts.benchmarks.measure import all_cores, core_list
from scripts.benchmarks.peers import PEERS
from scripts.benchmarks.servers import Server, Setting, command_server, served_model

_OURS = ("kvbaton", "kvbaton-colocated")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every target is given."""
    engines.add_model_options(parser)
    add = parser.add_argument
    add("--cores", help="cores of a server, such as 0,1 (default: all)")
    add("--prefill", type=int, default=1, metavar="N", help="kvbaton's prefill workers")
    add("--decode", type=int, default=1, metavar="N", help="kvbaton's decode workers")


@contextmanager
def setting_of(options: argparse.Namespace, **more: Any) -> Iterator[Setting]:
    """What the options say, and `more`. Its folders are gone afterwards."""
    with (
        engines.model_folder(options) as model,
        tempfile.TemporaryDirectory(prefix="kvbaton-bench-") as folder,
    ):
        yield Setting(
            model=model,
            cores=core_list(options.cores) or all_cores(),
            folder=Path(folder),
            num_prefill=options.prefill,
            num_decode=options.decode,
            **more,
        )


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
