"""What is known of a host, as plain values: scripts/host/gather.py finds them out, checks.py judges
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the rest must do without packages, to say that they are missing
    from common.kv.layout import KvLayout

UNLIMITED = -1


@dataclass(frozen=True)
class Torch:
    """`error`: why it cannot be imported, or "". `cuda`: the CUDA it was built for; "" for none.
    `capability`: what its CPU kernels use, such as AVX512 or DEFAULT."""

    version: str = ""
    cuda: str = ""
    capability: str = ""
    error: str = ""


@dataclass(frozen=True)
class Nixl:
    """`missing`: those of the devices named in settings that this host does not have."""

    version: str = ""  # "" for not installed
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arena:
    """The folder of a store's arena, and the room there. `free_bytes` counts an arena of ours that
    is there already. None: there is no such folder."""

    folder: str
    wanted_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class KeyFile:
    """A file with a key, or a folder of them. `mode` None: it is not there, or cannot be looked at,
    for the reason `error`."""

    path: str
    mode: int | None
    is_secret: bool = True
    error: str = ""


@dataclass(frozen=True)
class Clock:
    """`is_synchronised` None: cannot be told here."""

    is_synchronised: bool | None = None
    error_s: float = 0.0


@dataclass(frozen=True)
class Bind:
    """A TCP port that a process is to listen on. `error`: why it cannot be had now, or ""."""

    owner: str
    address: str
    port: int
    error: str = ""


@dataclass(frozen=True)
class StoreAnswer:
    """What a KV store said to a hello of ours. `as_role`: whose key was used. `problem` "": it
    would take us in. `field`: what it found fault with. `fingerprint`: of the model it serves,
    where we were told."""

    endpoint: str
    as_role: str
    is_open: bool
    problem: str = ""
    field: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Model:
    """A model's folder. `error`: why it cannot be served, or "". `fingerprint` and `layout` are
    known only where the model was loaded, and has then given a token."""

    folder: str
    error: str = ""
    fingerprint: str = ""
    layout: KvLayout | None = None


@dataclass(frozen=True)
class Facts:
    """All of it. What does not matter for `roles` is left at its default."""

    roles: tuple[str, ...]
    python: tuple[int, int]
    machine: str = "x86_64"
    cpu_flags: frozenset[str] = frozenset()
    num_cores: int = 1
    num_threads: int = 0  # of all workers of this host together
    packages: Mapping[str, str] = field(default_factory=dict)  # version; "" for one that is missing
    torch: Torch | None = None
    has_nvidia: bool = False
    xformers: str | None = None  # why it cannot be used, "" if it can; None: it is not installed
    compiler: str = ""
    nixl: Nixl | None = None  # None: no settings ask for it
    arenas: tuple[Arena, ...] = ()
    num_files: int = UNLIMITED  # RLIMIT_NOFILE
    locked_bytes: int = UNLIMITED  # RLIMIT_MEMLOCK
    keys: tuple[KeyFile, ...] = ()
    clock: Clock = Clock()
    binds: tuple[Bind, ...] = ()
    stores: tuple[StoreAnswer, ...] = ()
    model: Model | None = None
    unknown: tuple[str, ...] = ()  # what is wrong with the names of settings

    @property
    def has_workers(self) -> bool:
        """Whether there is to be an engine on this host."""
        return bool({"prefill", "decode"} & set(self.roles))
