"""Servers of the OpenAI API as processes: what they are told, and how they start and stop."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.benchmarks.measure import on_cores
from tests.ports import free_port

_START_S = 900.0  # vLLM compiles at its first start
_STOP_S = 20.0


@dataclass(frozen=True)
class Setting:
    """What all targets are given alike."""

    model: Path
    cores: list[int]
    folder: Path  # for logs and keys
    num_prefill: int = 1
    num_decode: int = 1
    num_colocated: int | None = None  # a worker for each core
    kv_bytes: str = "1G"
    vllm_venv: Path | None = None
    llama_venv: Path | None = None


class Busy(NamedTuple):
    """Seconds in which a worker had steps to run, and those of them in which its model computed."""

    steps_s: float
    arithmetic_s: float


@dataclass(frozen=True)
class Server:
    """One that runs. `first_url`: see LoadSpec. `pids`: processes whose CPU time is of interest, by
    name: all or none. `busy`: of each worker since its start, by name. `is_kvbaton`: requests may
    say which targets they have. `clear`: called before a load."""

    url: str
    model: str
    first_url: str = ""
    pids: Mapping[str, int] = field(default_factory=dict)
    busy: Callable[[], Mapping[str, Busy]] = dict
    is_kvbaton: bool = False
    clear: Callable[[], None] = lambda: None


@contextlib.contextmanager
def command_server(text: str, setting: Setting) -> Iterator[Server]:
    port = free_port()
    cores = ",".join(map(str, setting.cores))
    command = [
        part.format(port=port, model=setting.model, cores=cores) for part in shlex.split(text)
    ]
    with process_of(command, port, setting.cores, setting.folder) as served:
        yield served


@contextlib.contextmanager
def process_of(
    command: Sequence[str],
    port: int,
    cores: list[int],
    folder: Path,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """What a command serves on a port, once it answers. Its whole session is ended at the end.

    It gets this process's environment without PYTHONPATH, which is ours, and with `environ`.

    Raises RuntimeError, with the end of its log, if it ends before it serves.
    """
    path = new_folder(folder) / "server.log"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with path.open("wb") as log, on_cores(cores):
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **(environ or {})},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        model = _wait_for(url, process, path)
        yield Server(url, model)
    finally:
        _end(process)


def served_model(url: str) -> str:
    """The name of the model that an OpenAI server has. Raises OSError where none answers."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=_STOP_S) as answer:  # noqa: S310
        return str(json.load(answer)["data"][0]["id"])


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):  # URLError is one
            return served_model(url)
        time.sleep(0.5)
    text = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"{process.args!r} does not serve; its log ends with\n{text}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the one that was started; to what is left of its session after a while, SIGKILL.

    Its children have that while too, to remove what they have in shared memory.
    """
    process.terminate()
    deadline = time.monotonic() + _STOP_S
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def new_folder(folder: Path) -> Path:
    number = sum(1 for _ in folder.iterdir())
    made = folder / str(number)
    made.mkdir()
    return made
