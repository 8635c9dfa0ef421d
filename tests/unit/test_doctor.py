"""What the doctor says of a host, by value: each thing that can be wrong, and its remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.host import doctor
from scripts.host.checks import findings
from scripts.host.env_files import instances, parse_env
from scripts.host.facts import (
    Arena,
    Bind,
    Clock,
    Facts,
    KeyFile,
    Model,
    Nixl,
    StoreAnswer,
    Torch,
)
from scripts.host.findings import ERROR, OK, WARNING, Finding
from scripts.host.gather import gather

MIB = 1 << 20
STORE = StoreAnswer("tcp://10.0.0.1:5570", "decode", is_open=True)
WELL = Facts(
    roles=("gateway", "kvstore", "prefill", "decode"),
    python=(3, 11),
    cpu_flags=frozenset({"avx2", "avx512_bf16"}),
    num_cores=8,
    num_threads=8,
    packages={"pyzmq": "27.0", "torch": "2.13.0"},
    torch=Torch("2.13.0+cpu", "", "AVX512"),
    compiler="/usr/bin/g++",
    arenas=(Arena("/dev/shm", 256 * MIB, 4096 * MIB),),
    keys=(KeyFile("/k", 0o700, is_secret=False), KeyFile("/k/decode.key", 0o600)),
    clock=Clock(is_synchronised=True, error_s=0.01),
    binds=(Bind("kvstore.1", "10.0.0.1", 5570), Bind("decode.1", "10.0.0.1", 0)),
    stores=(STORE,),
    model=Model("/m", fingerprint="a" * 64),
)


def said(**changes: Any) -> list[Finding]:
    """What is said of a host that is well but for this, besides that the rest is well."""
    facts = dataclasses.replace(WELL, **changes)
    return [finding for finding in findings(facts) if finding.level != OK]


def test_a_host_that_is_well() -> None:
    found = findings(WELL)
    assert {finding.level for finding in found} == {OK}
    assert {finding.remedy for finding in found} == {""}
    assert {finding.subject for finding in found} >= {"torch", "memory", "keys", "stores", "model"}


@pytest.mark.parametrize(
    ("changes", "level", "subject", "words", "remedy"),
    [
        ({"python": (3, 10)}, ERROR, "python", "3.10 is too old", "KVBATON_PYTHON"),
        ({"packages": {"pyzmq": ""}}, ERROR, "packages", "missing: pyzmq", "scripts/setup"),
        ({"torch": Torch(error="no libgomp")}, ERROR, "torch", "no libgomp", "scripts/setup"),
        ({"torch": Torch("2.10.1")}, ERROR, "torch", "2.10.1 is not 2.11 up to", "scripts/setup"),
        ({"torch": Torch("2.14.0")}, ERROR, "torch", "without, 2.14", "scripts/setup"),
        ({"torch": Torch("2.13.0", "13.0")}, WARNING, "torch", "gigabytes", "TORCH_INDEX"),
        ({"has_nvidia": True}, WARNING, "gpu", "built for CPUs alone", "KVBATON_CUDA=yes"),
        (
            {"has_nvidia": True, "torch": Torch("2.13.0", "13.0")},
            WARNING, "gpu", "xformers is not installed", "KVBATON_CUDA=yes",
        ),
        (
            {"has_nvidia": True, "torch": Torch("2.13.0", "13.0"), "xformers": "no libcudart"},
            ERROR, "gpu", "no CUDA kernels: no libcudart", "nvidia-cuda-runtime-cu12",
        ),
        ({"cpu_flags": frozenset({"sse4"})}, WARNING, "processor", "no AVX2", "another host"),
        ({"num_threads": 9}, WARNING, "processor", "9 threads on 8 cores", "KVBATON_THREADS"),
        ({"compiler": ""}, WARNING, "compiler", "no C++ compiler", "install g++"),
        ({"nixl": Nixl()}, ERROR, "nixl", "the package is not installed", "'.[nixl]'"),
        (
            {"nixl": Nixl("1.5.1", ("mlx5_7",))},
            ERROR, "nixl", "no network device mlx5_7", "KVBATON_NIXL_DEVICES",
        ),
        (
            {"arenas": (Arena("/dev/shm", 60 * MIB, 64 * MIB),) * 2},
            ERROR, "memory", "need 120 MiB, 64 MiB are free", "remount",
        ),
        ({"arenas": (Arena("/x", 1, None),)}, ERROR, "memory", "/x is not there", "ARENA_DIR"),
        ({"unknown": ("there is no setting X",)}, ERROR, "settings", "no setting X", "the name"),
        ({"num_files": 1024}, WARNING, "limits", "1024 open files", "ulimit -n"),
        ({"clock": Clock(False)}, WARNING, "clock", "set by nobody", "chrony"),
        ({"clock": Clock(True, 2.5)}, WARNING, "clock", "may be 2.5 s wrong", "chrony"),
        (
            {"keys": (KeyFile("/k/a.key", 0o640),)},
            ERROR, "keys", "others may read /k/a.key (mode 0640)", "chmod 600 /k/a.key",
        ),
        (
            {"keys": (KeyFile("/k", 0o777, is_secret=False),)},
            ERROR, "keys", "others may write /k (mode 0777)", "chmod go-w /k",
        ),
        (
            {"keys": (KeyFile("/k/a.key", None, error="No such file"),)},
            ERROR, "keys", "/k/a.key: No such file", "scripts/keygen",
        ),
        (
            {"binds": (Bind("kvstore.1", "h", 5570), Bind("gateway.1", "h", 5570))},
            ERROR, "ports", "5570 is to be for kvstore.1 and for gateway.1", "a port of its own",
        ),
        (
            {"binds": (Bind("kvstore.1", "h", 5570, "Address already in use"),)},
            WARNING, "ports", "for kvstore.1: Address already in use", "ss -ltnp",
        ),
        ({"model": Model("/m", error="no config")}, ERROR, "model", "no config", "KVBATON_MODEL"),
        (
            {"stores": (dataclasses.replace(STORE, is_open=False, problem="refused"),)},
            WARNING, "stores", "refused", "yet to be started",
        ),
        (
            {
                "roles": ("decode",),
                "stores": (dataclasses.replace(STORE, is_open=False, problem="refused"),),
            },
            ERROR, "stores", "refused", "firewalls on the way",
        ),
        (
            {"stores": (dataclasses.replace(STORE, problem="no answer to a hello"),)},
            ERROR, "stores", "no answer", "keys of this cluster",
        ),
        (
            {"stores": (dataclasses.replace(STORE, problem="version 2 is not supported"),)},
            ERROR, "stores", "version 2", "the same release",
        ),
        (
            {"stores": (dataclasses.replace(STORE, problem="serves model", field="fingerprint"),)},
            ERROR, "stores", "serves model", "copy the model folder",
        ),
        (
            {"stores": (dataclasses.replace(STORE, fingerprint="b" * 64),)},
            ERROR, "stores", "serves model bbbbbbbbbbbb, here is aaaaaaaaaaaa", "copy the model",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(
    changes: dict[str, Any], level: str, subject: str, words: str, remedy: str
) -> None:
    (finding,) = said(**changes)
    assert (finding.level, finding.subject) == (level, subject)
    assert words in finding.message
    assert remedy in finding.remedy


def test_a_processor_without_bfloat16_products_is_well() -> None:
    facts = dataclasses.replace(WELL, cpu_flags=frozenset({"avx2"}))
    assert said(cpu_flags=facts.cpu_flags) == []
    (processor,) = [each for each in findings(facts) if each.subject == "processor"]
    assert "float32 would be no faster" in processor.message


def test_a_host_without_workers_needs_no_engine() -> None:
    bare = {"torch": None, "compiler": "", "cpu_flags": frozenset[str](), "model": None}
    assert said(roles=("gateway",), num_threads=0, **bare) == []


# ---- settings -----------------------------------------------------------------------------------


def test_settings_are_read_as_systemd_reads_them() -> None:
    text = "# no\n; no\nA=1\n B = \"two words\" \nC='x'\nA=3\nnothing\n#D=4\n"
    assert parse_env(text) == {"A": "3", "B": "two words", "C": "x"}


def test_an_instance_has_its_own_settings_above_its_roles_and_those_of_all(tmp_path: Path) -> None:
    for name, text in {
        "common": "A=all\nB=all\nC=all",
        "decode": "B=role\nC=role",
        "decode-2": "C=own",
        "prefill-1": "",
    }.items():
        (tmp_path / f"{name}.env").write_text(text)
    found = list(instances(tmp_path, ("gateway", "decode"), {"A": "shell", "HOME": "/"}))
    assert found == [
        ("gateway", "gateway.1", {"A": "shell", "HOME": "/"}),
        ("decode", "decode.2", {"A": "all", "B": "role", "C": "own", "HOME": "/"}),
    ]


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"python": (3, 10)}, 1)])
def test_errors_decide_the_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    status: int,
) -> None:
    facts = dataclasses.replace(WELL, compiler="", **changes)
    monkeypatch.setattr(doctor, "gather", lambda *_args, **_options: facts)
    assert doctor.main(["--json"]) == status
    levels = [each["level"] for each in json.loads(capsys.readouterr().out)]
    assert levels.count("error") == status
    assert levels.count("warning") == 1
    assert doctor.main([]) == status
    text = capsys.readouterr().out
    assert "warning  compiler   there is no C++ compiler" in text
    assert "-> install g++" in text


def test_a_role_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--role", "router"]) == 2
    assert "got 'router'" in capsys.readouterr().err


def test_devices_for_nixl_are_looked_for_only_where_they_are_named() -> None:
    store = ("kvstore", "kvstore.1", {"KVBATON_NIXL_DEVICES": "lo, none0:1"})
    facts = gather(("kvstore",), [store], load_model=False)
    assert facts.nixl is not None
    assert facts.nixl.missing == ("none0",)
    assert gather(("kvstore",), [("kvstore", "kvstore.1", {})], load_model=False).nixl is None
