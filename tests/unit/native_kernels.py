"""The compiled kernels as they are on other processors than this one."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

from common.engine.native.library import compile_library

CPU_FLAGS = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()


def emulated(header: str) -> ctypes.CDLL:
    """With instructions that this processor may lack, by a header of this folder; compiled anew
    whenever that changes."""
    path = Path(__file__).with_name(header)
    version = hashlib.sha256(path.read_bytes()).hexdigest()
    return compile_library(
        "g++", flags=("-O1", "-include", str(path), f"-DEMULATION_{version[:16]}")
    )
