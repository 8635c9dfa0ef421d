"""Compiles the C++ of this folder once per machine and loads it by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from common.locks import locked

log = structlog.get_logger()

_FOLDER = Path(__file__).parent
_SOURCES = tuple(sorted(_FOLDER.glob("*.cpp")))
_HEADERS = tuple(sorted(_FOLDER.glob("*.h")))
# tune: the compiler's notes on one processor cost a third of the speed on another like it
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-mtune=generic", "-fPIC")
_COMPILE_SECONDS = 120


@functools.cache
def load_library(threaded: bool) -> ctypes.CDLL | None:
    """The compiled kernels, or None (and one line in the log) where they cannot be had.

    Only with `threaded` do they use OpenMP, and then torch's threads, if torch's runtime is the
    system's: torch is loaded first, and both go by one name.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    try:
        if compiler is None:
            raise FileNotFoundError("there is no C++ compiler (g++)")
        return compile_library(compiler, threaded=threaded)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("native_kernels_unavailable", reason=reason, using="torch, slower")
        return None


def compile_library(
    compiler: str, *, threaded: bool = False, flags: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """Compile unless it was; of several processes that want it at once, one does so.

    `flags` come after the usual ones. Raises OSError, RuntimeError or SubprocessError where it
    cannot be compiled, kept or loaded.
    """
    folder = _cache_folder()
    flags = _FLAGS + flags
    path = folder / f"native-{_key(compiler, flags)}{'.threaded' if threaded else ''}.so"
    if not path.exists():
        with locked(folder):
            if not path.exists():
                _build(path, [compiler, *flags, *(("-fopenmp",) if threaded else ())])
    return ctypes.CDLL(str(path))


def _build(path: Path, command: list[str]) -> None:
    """Compile all sources at once, each on a core if there are as many; the library appears whole
    or not at all."""
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as made,
        ThreadPoolExecutor(len(_SOURCES)) as threads,
    ):
        objects = [f"{made}/{source.stem}.o" for source in _SOURCES]
        parts = [
            [*command, "-c", str(source), "-o", target]
            for source, target in zip(_SOURCES, objects, strict=True)
        ]
        list(threads.map(_run, parts))
        _run([*command, "-shared", "-o", f"{made}/whole.so", *objects])
        Path(made, "whole.so").replace(path)


def _run(command: list[str]) -> str:
    """What the system's compiler says. Raises OSError or SubprocessError."""
    done = subprocess.run(  # noqa: S603 - on our own source
        command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS
    )
    return done.stdout


def build_name(library: ctypes.CDLL) -> str:
    """Equal for libraries that give the same bits: threads do not change a row's."""
    return Path(library._name).name.split(".")[0]


def _cache_folder() -> Path:
    """kvbaton below $XDG_CACHE_HOME or ~/.cache, made if need be.

    Raises OSError where it cannot be used. What lies there is executed: it must be ours.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "kvbaton"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the source, the flags, the compiler and the processor (-march=native)."""
    digest = hashlib.sha256()
    for path in (*_SOURCES, *_HEADERS):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([compiler, "--version"])
    digest.update(repr((flags, compiler, version, platform.machine())).encode())
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        lines = processor.read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        digest.update(repr(sorted({line for line in lines if line.startswith(wanted)})).encode())
    return digest.hexdigest()[:32]
