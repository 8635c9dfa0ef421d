"""Other servers, from virtual environments of their own: they are never dependencies.

vllm: one server on all cores, with its defaults; vllm:192 with so many tokens in a step at most.
vllm-pd: one to prefill and one to decode, half of the cores each, KV as files in shared memory by
its ExampleConnector. llama-cpp: llama-cpp-python behind peer_llama.py, one request at a time. How
the environments are made is told in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common.engine.config import load_config
from scripts.benchmarks.servers import Server, Setting, process_of
from tests.ports import free_port

_FOLDER = Path(__file__).parent
_CONTEXT = 4096  # unless the model has less
# Debian's libtcmalloc-minimal4; vLLM's own advice for CPUs.
_TCMALLOC = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
_CONVERT_S = 600


@contextlib.contextmanager
def _vllm(options: str, setting: Setting) -> Iterator[Server]:
    budget = ("--max-num-batched-tokens", str(int(options))) if options else ()
    with _vllm_server(setting, setting.cores, *budget) as served:
        yield served


@contextlib.contextmanager
def _vllm_pd(_options: str, setting: Setting) -> Iterator[Server]:
    half = max(1, len(setting.cores) // 2)
    shared = Path(tempfile.mkdtemp(prefix="kvbaton-bench-", dir="/dev/shm"))
    config = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(shared)},
    }
    given = ("--kv-transfer-config", json.dumps(config))

    def clear() -> None:
        for each in shared.iterdir():
            shutil.rmtree(each)

    try:
        with (
            _vllm_server(setting, setting.cores[:half], *given) as prefill,
            _vllm_server(setting, setting.cores[-half:], *given) as decode,
        ):
            yield Server(decode.url, decode.model, first_url=prefill.url, clear=clear)
    finally:
        shutil.rmtree(shared)


@contextlib.contextmanager
def _vllm_server(setting: Setting, cores: list[int], *options: str) -> Iterator[Server]:
    venv = _venv(setting.vllm_venv, "--vllm-venv")
    port = free_port()
    command = [
        str(venv / "bin" / "vllm"), "serve", str(setting.model), "--dtype", "bfloat16",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(_context(setting)),
        "--served-model-name", "m", *options,
    ]  # fmt: skip
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, _preloads(venv))),
    }
    with process_of(command, port, cores, setting.folder, environ) as served:
        yield served


def _preloads(venv: Path) -> list[Path]:
    """tcmalloc and vLLM's own OpenMP, those of them that are there."""
    found = [Path(folder) / "libtcmalloc_minimal.so.4" for folder in _TCMALLOC]
    return [path for path in (*found, *venv.glob("lib/libiomp5.so")) if path.exists()]


@contextlib.contextmanager
def _llama(_options: str, setting: Setting) -> Iterator[Server]:
    python = _venv(setting.llama_venv, "--llama-venv") / "bin" / "python"
    gguf = setting.folder / "model.gguf"
    if not gguf.exists():
        convert = [str(python), str(_FOLDER / "peer_gguf.py"), str(setting.model), str(gguf)]
        subprocess.run(convert, check=True, timeout=_CONVERT_S)
    port = free_port()
    command = [
        str(python), str(_FOLDER / "peer_llama.py"), str(gguf), str(port),
        "--threads", str(len(setting.cores)), "--context", str(_context(setting)),
    ]  # fmt: skip
    with process_of(command, port, setting.cores, setting.folder) as served:
        yield served


def _context(setting: Setting) -> int:
    return min(_CONTEXT, load_config(setting.model).max_position_embeddings)


def _venv(folder: Path | None, flag: str) -> Path:
    if folder is None or not (folder / "bin" / "python").exists():
        raise ValueError(f"{flag} is {folder}: it must name a virtual environment")
    return folder.absolute()


PEERS: dict[str, Callable[[str, Setting], contextlib.AbstractContextManager[Server]]] = {
    "vllm": _vllm,
    "vllm-pd": _vllm_pd,
    "llama-cpp": _llama,
}
