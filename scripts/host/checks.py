"""Judges what is known of a host. Pure: facts in, findings out, each with what to do about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from scripts.host.cluster_checks import of_cluster
from scripts.host.facts import UNLIMITED, Facts
from scripts.host.findings import ERROR, OK, WARNING, Finding

LEAST_PYTHON = (3, 11)
TORCH = ((2, 11), (2, 14))  # as in pyproject.toml: from the first, below the second
LEAST_FILES = 4096
MOST_CLOCK_ERROR_S = 0.1

_SET_UP = "run scripts/setup cluster in the folder of the installation"


def findings(facts: Facts) -> list[Finding]:
    """What there is to say, in the order in which things are needed."""
    on_host = [
        _python,
        _packages,
        _torch,
        _gpu,
        _processor,
        _compiler,
        _nixl,
        _memory,
        _limits,
        _clock,
    ]
    found = [finding for check in [*on_host, _names] for finding in check(facts)]
    return [*found, *of_cluster(facts)]


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
    elif facts.machine == "x86_64" and "avx512_bf16" not in facts.cpu_flags:
        yield Finding(
            OK,
            "processor",
            f"{facts.num_cores} cores that do not multiply bfloat16: prefill at half the rate, "
            "decode as fast; KVBATON_DTYPE=float32 would be no faster",
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
            "there is no C++ compiler: torch computes every step, several times slower",
            "install g++ (on Debian: apt-get install g++)",
        )


def _nixl(facts: Facts) -> Iterator[Finding]:
    nixl = facts.nixl
    if nixl is None:
        return
    if not nixl.version:
        yield Finding(
            ERROR,
            "nixl",
            "KVBATON_NIXL_DEVICES is set, and the package is not installed",
            ".venv/bin/python -m pip install --editable '.[nixl]', there too",
        )
    if nixl.missing:
        yield Finding(
            ERROR,
            "nixl",
            f"there is no network device {', '.join(nixl.missing)}",
            "correct KVBATON_NIXL_DEVICES: ls /sys/class/infiniband /sys/class/net names them",
        )
    elif nixl.version:
        yield Finding(OK, "nixl", nixl.version)


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


def _names(facts: Facts) -> Iterator[Finding]:
    for problem in facts.unknown:
        yield Finding(
            ERROR, "settings", problem, "nothing reads it: correct the name, or take it away"
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
