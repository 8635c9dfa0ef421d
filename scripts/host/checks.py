"""Judges what is known of a host. Pure: facts in, findings out, each with what to do about it."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from scripts.host.facts import UNLIMITED, Facts

OK, WARNING, ERROR = "ok", "warning", "error"
LEAST_PYTHON = (3, 11)
TORCH = ((2, 11), (2, 14))  # as in pyproject.toml: from the first, below the second
LEAST_FILES = 4096
MOST_CLOCK_ERROR_S = 0.1

_SET_UP = "run scripts/setup cluster in the folder of the installation"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Finding:
    """`level` is ok, warning (it runs, but worse than it could) or error (it will not run).
    `remedy` says what to do; "" where all is well."""

    level: str
    subject: str
    message: str
    remedy: str = ""


def findings(facts: Facts) -> list[Finding]:
    """What there is to say, in the order in which things are needed."""
    on_host = [_python, _packages, _torch, _gpu, _processor, _compiler, _memory, _limits, _clock]
    of_cluster = [_keys, _ports, _model, _stores]
    return [finding for check in (*on_host, *of_cluster) for finding in check(facts)]


# ---- what is installed --------------------------------------------------------------------------


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python >= LEAST_PYTHON:
        yield Finding(OK, "python", f"Python {version}")
    else:
        yield Finding(
            ERROR,
            "python",
            f"Python {version} is too old",
            "install 3.11 or newer with venv and run KVBATON_PYTHON=python3.11 scripts/setup",
        )


def _packages(facts: Facts) -> Iterator[Finding]:
    missing = sorted(name for name, version in facts.packages.items() if not version)
    if missing:
        yield Finding(ERROR, "packages", f"missing: {', '.join(missing)}", _SET_UP)
    else:
        yield Finding(OK, "packages", f"all {len(facts.packages)} are there")


def _torch(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None:
        return
    if torch.error:
        yield Finding(ERROR, "torch", f"cannot be imported: {torch.error}", _SET_UP)
        return
    least, above = TORCH
    major, minor = torch.version.split(".")[:2]
    if not least <= (int(major), int(minor)) < above:
        wanted = f"{least[0]}.{least[1]} up to, but without, {above[0]}.{above[1]}"
        yield Finding(ERROR, "torch", f"{torch.version} is not {wanted}", _SET_UP)
        return
    build = f"for CUDA {torch.cuda}" if torch.cuda else "for CPUs"
    yield Finding(OK, "torch", f"{torch.version}, built {build}")
    if torch.cuda and not facts.has_nvidia:
        yield Finding(
            WARNING,
            "torch",
            "its CUDA build takes gigabytes that this host has no use for",
            "remove .venv, KVBATON_TORCH_INDEX=https://download.pytorch.org/whl/cpu scripts/setup",
        )


def _gpu(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None or torch.error or not facts.has_nvidia:
        return
    if not torch.cuda:
        yield Finding(
            WARNING,
            "gpu",
            "there is an NVIDIA driver, and torch is built for CPUs alone",
            "remove .venv and run KVBATON_CUDA=yes scripts/setup cluster",
        )
    elif facts.xformers is None:
        yield Finding(
            WARNING,
            "gpu",
            "xformers is not installed: attention has no CUDA kernels",
            "run KVBATON_CUDA=yes scripts/setup cluster, which installs it without its own torch",
        )
    elif facts.xformers:
        # Its wheel is linked with libcudart.so.12 whatever CUDA torch brings (dependencies.md).
        yield Finding(
            ERROR,
            "gpu",
            f"xformers has no CUDA kernels: {facts.xformers}",
            ".venv/bin/python -m pip install nvidia-cuda-runtime-cu12, which has libcudart.so.12",
        )
    else:
        yield Finding(OK, "gpu", f"torch for CUDA {torch.cuda} and xformers")


def _processor(facts: Facts) -> Iterator[Finding]:
    if not facts.has_workers:
        return
    if facts.machine == "x86_64" and "avx2" not in facts.cpu_flags:
        yield Finding(
            WARNING,
            "processor",
            "it has no AVX2: every product of matrices is several times slower",
            "use another host for workers, or pass the host's processor on to a virtual machine",
        )
    elif facts.machine == "x86_64" and not {"avx512_bf16", "amx_bf16"} & facts.cpu_flags:
        yield Finding(
            OK, "processor", "AVX2, no bfloat16: KVBATON_DTYPE=float32 may be faster than bfloat16"
        )
    else:
        yield Finding(OK, "processor", f"{facts.machine}, {facts.num_cores} cores")
    if facts.num_threads > facts.num_cores:
        yield Finding(
            WARNING,
            "processor",
            f"workers are to compute with {facts.num_threads} threads on {facts.num_cores} cores",
            "lower KVBATON_THREADS, or run fewer workers here: more threads than cores are slower",
        )


def _compiler(facts: Facts) -> Iterator[Finding]:
    if not facts.has_workers:
        return
    if facts.compiler:
        yield Finding(OK, "compiler", facts.compiler)
    else:
        yield Finding(
            WARNING,
            "compiler",
            "there is no C++ compiler: torch computes attention instead, slower at decode",
            "install g++ (on Debian: apt-get install g++)",
        )


# ---- the host -----------------------------------------------------------------------------------


def _memory(facts: Facts) -> Iterator[Finding]:
    room: dict[str, int | None] = {each.folder: each.free_bytes for each in facts.arenas}
    wanted: dict[str, int] = defaultdict(int)
    for arena in facts.arenas:
        wanted[arena.folder] += arena.wanted_bytes
    for folder, num_bytes in wanted.items():
        free = room[folder]
        if free is None:
            yield Finding(
                ERROR, "memory", f"{folder} is not there", "mount it, or set KVBATON_ARENA_DIR"
            )
        elif free < num_bytes:
            yield Finding(
                ERROR,
                "memory",
                f"arenas in {folder} need {_mib(num_bytes)}, {_mib(free)} are free",
                f"mount -o remount,size=... {folder}, or lower KVBATON_KV_BYTES",
            )
        else:
            yield Finding(OK, "memory", f"{_mib(num_bytes)} of {_mib(free)} in {folder}")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.num_files != UNLIMITED and facts.num_files < LEAST_FILES:
        yield Finding(
            WARNING,
            "limits",
            f"{facts.num_files} open files are allowed here; each client takes one of them",
            f"ulimit -n {LEAST_FILES}; the units set LimitNOFILE= themselves",
        )
    else:
        yield Finding(OK, "limits", "open files")
    pins = facts.has_workers and facts.has_nvidia
    if pins and facts.locked_bytes != UNLIMITED:
        yield Finding(
            WARNING,
            "limits",
            f"{_mib(facts.locked_bytes)} of memory may be locked here; copies to a GPU lock some",
            "ulimit -l unlimited; the units set LimitMEMLOCK= themselves",
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    clock = facts.clock
    if clock.is_synchronised is None:
        return
    if not clock.is_synchronised or clock.error_s > MOST_CLOCK_ERROR_S:
        why = f"may be {clock.error_s:.3g} s wrong" if clock.is_synchronised else "is set by nobody"
        # Processes measure with clocks of their own: nothing breaks, but logs do not fit together.
        yield Finding(
            WARNING,
            "clock",
            f"it {why}: the logs of several hosts cannot be put in order",
            "run chrony or systemd-timesyncd",
        )
    else:
        yield Finding(OK, "clock", f"right within {clock.error_s * 1000:.3g} ms")


def _keys(facts: Facts) -> Iterator[Finding]:
    for key in facts.keys:
        if key.mode is None:
            yield Finding(
                ERROR,
                "keys",
                f"{key.path}: {key.error}",
                "copy it from where scripts/keygen made the cluster's keys, or run it once there",
            )
        elif key.mode & (_OTHERS if key.is_secret else _WRITABLE):
            wanted = "600" if key.is_secret else "go-w"
            may = "read" if key.is_secret else "write"
            yield Finding(
                ERROR,
                "keys",
                f"others may {may} {key.path} (mode {key.mode:04o})",
                f"chmod {wanted} {key.path}",
            )
    if facts.keys and all(key.mode is not None for key in facts.keys):
        yield Finding(OK, "keys", f"{len(facts.keys)} files are there")


# ---- the cluster --------------------------------------------------------------------------------


def _ports(facts: Facts) -> Iterator[Finding]:
    owners: dict[int, list[str]] = defaultdict(list)
    for bind in facts.binds:
        if bind.port:
            owners[bind.port].append(bind.owner)
        if bind.error:
            yield Finding(
                WARNING,
                "ports",
                f"port {bind.port} of {bind.address}, for {bind.owner}: {bind.error}",
                f"nothing, if {bind.owner} runs by now; else see `ss -ltnp`, or choose another",
            )
    clashes = {port: names for port, names in owners.items() if len(names) > 1}
    for port, names in clashes.items():
        yield Finding(
            ERROR,
            "ports",
            f"port {port} is to be for {' and for '.join(names)}",
            "give each a port of its own: KVBATON_BIND and KVBATON_DATA_BIND in /etc/kvbaton/*.env",
        )
    if facts.binds and not clashes:
        yield Finding(OK, "ports", f"{len(facts.binds)} ports, no two alike")


def _model(facts: Facts) -> Iterator[Finding]:
    model = facts.model
    if model is None:
        return
    if model.error:
        yield Finding(
            ERROR,
            "model",
            f"{model.folder}: {model.error}",
            "KVBATON_MODEL must name a Hugging Face folder, the same on every host",
        )
    elif model.fingerprint:
        yield Finding(OK, "model", f"{model.folder} gives tokens; it is {model.fingerprint[:12]}")
    else:
        yield Finding(OK, "model", f"{model.folder} is there; --load-model tries it")


def _stores(facts: Facts) -> Iterator[Finding]:
    own = facts.model.fingerprint if facts.model else ""
    for store in facts.stores:
        subject, name = "stores", f"{store.endpoint}, asked with the key of {store.as_role}"
        if not store.is_open and "kvstore" in facts.roles:
            yield Finding(
                WARNING,
                subject,
                f"{name}: {store.problem}",
                "nothing, if it is this host's and is yet to be started; else see KVBATON_STORES",
            )
        elif not store.is_open:
            yield Finding(
                ERROR,
                subject,
                f"{name}: {store.problem}",
                "start it; check KVBATON_STORES and its KVBATON_BIND, and firewalls on the way",
            )
        elif store.field == "fingerprint":
            yield Finding(
                ERROR,
                subject,
                f"{name}: {store.problem}",
                "copy the model folder from a host that serves, and use the same KVBATON_DTYPE",
            )
        elif "version" in store.problem:
            yield Finding(
                ERROR,
                subject,
                f"{name}: {store.problem}",
                "install the same release of kvbaton on all hosts: see docs/systemd.md",
            )
        elif store.problem:
            yield Finding(
                ERROR,
                subject,
                f"{name}: {store.problem}",
                "keys of this cluster are needed: copy ROLE.key and public.json from its keygen",
            )
        elif own and store.fingerprint not in ("", own):
            yield Finding(
                ERROR,
                subject,
                f"{name}: it serves model {store.fingerprint[:12]}, here is {own[:12]}",
                "copy the model folder from a host that serves, and use the same KVBATON_DTYPE",
            )
        else:
            serves = f", serves model {store.fingerprint[:12]}" if store.fingerprint else ""
            yield Finding(OK, subject, f"{name}: it would take us in{serves}")
