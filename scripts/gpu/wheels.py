"""Packages for a machine without a network: fetched into a folder here, used from it there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What a Python with torch, transformers and numpy usually lacks of what the services need. Without
# their requirements: xformers would bring a torch of its own. It wants libcudart.so.12, whatever
# CUDA torch was built for.
PACKAGES = (
    "xformers==0.0.35",
    "nvidia-cuda-runtime-cu12",
    "pyzmq",
    "msgpack",
    "msgspec",
    "structlog",
    "starlette",
    "uvicorn",
    "httptools",
    "uvloop",
    "prometheus_client",
    "honcho",
    "xxhash",
    "llguidance>=1.7",
)
_GLIBC_VERSIONS = range(5, 40)  # 2.N, of manylinux_2_N, which pip matches one by one
_MARK = "KVBATON_GPU_CHECK_WHEELS"


def download(folder: Path, python_version: str) -> None:
    """Fetch the wheels of PACKAGES for Linux on x86-64. Raises CalledProcessError."""
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in _GLIBC_VERSIONS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python_version}", "--implementation=cp", *platforms]
    subprocess.run([*command, "-d", str(folder), *PACKAGES], check=True)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {num_bytes / 2**20:.0f} MiB of wheels")


def run_again_with(folder: Path) -> None:
    """Replace this process by one that finds the wheels' packages, unless it is that one. They are
    unpacked into a temporary folder. Raises CalledProcessError."""
    if _MARK in os.environ:
        return
    target = tempfile.mkdtemp(prefix="kvbaton-wheels-")
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", target, *wheels], check=True)
    paths = [os.environ["PYTHONPATH"], target]
    environ = {**os.environ, _MARK: target, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, environ)  # noqa: S606 - it is this program


def unpacked() -> str:
    """The temporary folder that `run_again_with` made, or nothing."""
    return os.environ.get(_MARK, "")
