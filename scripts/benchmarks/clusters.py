"""kvbaton clusters to load, each worker on cores of its own."""

from __future__ import annotations

import contextlib
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any
from unittest.mock import patch

from scripts.benchmarks.measure import on_cores
from scripts.benchmarks.servers import Busy, Server, Setting, new_folder, served_model
from tests.cluster.processes import Cluster
from tests.ports import free_port

_ROLES = ("gateway", "store", "worker", "prefill", "decode")
_SECONDS = re.compile(r"^kvbaton_worker_(busy|arithmetic)_seconds_total{.*} (\S+)$", re.MULTILINE)


def service_settings(text: str) -> dict[str, dict[str, str]]:
    """Settings by service, from such as gateway.max_wait_s=9,worker.threads=2."""
    settings: dict[str, dict[str, str]] = {role: {} for role in _ROLES}
    for each in filter(None, text.split(",")):
        name, equals, value = each.partition("=")
        role, _, key = name.partition(".")
        if role not in settings or not key or not equals:
            raise ValueError(f"{each!r} must be SERVICE.SETTING=VALUE, of {', '.join(_ROLES)}")
        settings[role][key] = value
    return settings


@contextlib.contextmanager
def kvbaton_server(
    setting: Setting, settings: Mapping[str, Mapping[str, Any]], *, is_colocated: bool
) -> Iterator[Server]:
    """Workers have a core each, in turn; gateway and store may use all of the cores."""
    num_prefill, num_decode = setting.num_prefill, setting.num_decode
    if is_colocated:
        num_prefill, num_decode = 0, setting.num_colocated or len(setting.cores)
    cores = cycle(setting.cores)
    ports: dict[str, int] = {}  # of each worker's metrics
    with (
        patch.dict(os.environ, {"OMP_WAIT_POLICY": "passive"}),
        Cluster(new_folder(setting.folder)) as cluster,
    ):
        with on_cores(setting.cores):
            cluster.start("kvstore", **{"kv_bytes": setting.kv_bytes, **settings["store"]})
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            for number in range(1, count + 1):
                port = ports[f"{role}.{number}"] = free_port()
                given = {"model": setting.model, **settings["worker"], **settings[role]}
                threads = int(given.get("threads", 1))
                with on_cores({next(cores) for _ in range(threads)}):
                    cluster.start(role, number, **given, metrics_port=port)
        mode = "colocated" if is_colocated else "disaggregated"
        with on_cores(setting.cores):
            gateway = {"model": setting.model, "mode": mode, **settings["gateway"]}
            cluster.start("gateway", **gateway)
        cluster.wait_ready(num_prefill + num_decode)
        pids = {name: process.pid for name, process in cluster.processes.items()}
        url = cluster.base_url
        yield Server(
            url,
            served_model(url),
            pids=pids,
            busy=lambda: {name: _busy(port) for name, port in ports.items()},
            is_kvbaton=True,
        )


def _busy(port: int) -> Busy:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return busy_of(answer.read().decode())


def busy_of(metrics: str) -> Busy:
    """What a worker's own metrics say."""
    seconds = {name: float(value) for name, value in _SECONDS.findall(metrics)}
    return Busy(seconds["busy"], seconds["arithmetic"])
