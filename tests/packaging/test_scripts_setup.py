"""scripts/setup, with a stand-in for Python and pip that writes down what it is asked for."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A venv is a folder whose bin/python is this script again; packages are files beside it.
PYTHON = """#!/bin/bash
venv=$(dirname "$(dirname "$0")")
case "$*" in
  --version) echo "Python 3.11.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*)
    echo "${@:5}" >> "$PIP_LOG"
    [ -z "$PIP_FAILS" ] || { echo "no network"; exit 1; }
    [ -z "$PIP_WAITS" ] || { echo reached > "$PIP_WAITS"; read -r _ < "$PIP_WAITS"; }
    for word; do touch "$venv/has-$(basename "${word%%=*}")"; done ;;
  *"import sys, torch"*) [ -e "$venv/has-torch" ] ;;
  *load_library*) [ -z "$NO_COMPILER" ] ;;
  *"import honcho"*) [ ! -e "$venv/damaged" ] ;;
  *"import ensurepip"*) ;;
  *) exit 9 ;;
esac
"""

Setup = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout in a path with a blank."""
    folder = tmp_path / "kv baton"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", folder / "scripts/setup")
    (folder / "pyproject.toml").write_text("[project]\n")
    stand_in = tmp_path / "python3.11"
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Setup:
    """Starts scripts/setup in a folder."""

    def start(folder: Path, *args: str, **environ: str) -> "subprocess.Popen[str]":
        path = f"{tmp_path}:/usr/bin:/bin"
        return subprocess.Popen(
            [folder / "scripts/setup", *args],
            env={"PATH": path, "PIP_LOG": str(tmp_path / "pip.log"), "KVBATON_CUDA": "no"}
            | environ,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def result(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit status and the lines it said."""
    _, text = process.communicate()
    return process.returncode, [line.removeprefix("setup: ") for line in text.splitlines()]


def installed(tmp_path: Path) -> list[str]:
    """What pip was asked for since the last call."""
    log = tmp_path / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.removeprefix("--disable-pip-version-check ") for line in lines]


def test_it_installs_once_and_says_each_stage(tmp_path: Path, folder: Path, start: Setup) -> None:
    status, said = result(start(folder))
    assert status == 0
    assert [line.split(" (")[0] for line in said] == [
        "making .venv with Python 3.11.0",
        "installing torch, the largest part",
        "installing kvbaton[cluster]",
        "compiling the engine's kernels",
        "done",
    ]
    assert installed(tmp_path) == ["torch==2.13.*", "--editable .[cluster]"]
    assert result(start(folder)) == (0, [])
    assert installed(tmp_path) == []


def test_dev_adds_to_cluster_and_keeps_its_torch(
    tmp_path: Path, folder: Path, start: Setup
) -> None:
    result(start(folder))
    installed(tmp_path)
    assert result(start(folder, "dev"))[0] == 0
    assert installed(tmp_path) == ["--editable .[cluster,dev]", "--no-deps xformers==0.0.35"]
    assert result(start(folder, "cluster")) == (0, [])


def test_a_machine_with_cuda_gets_xformers(tmp_path: Path, folder: Path, start: Setup) -> None:
    result(start(folder, KVBATON_CUDA="yes"))
    assert installed(tmp_path)[-1] == "--no-deps xformers==0.0.35"


def test_an_index_for_torch_is_passed_on(tmp_path: Path, folder: Path, start: Setup) -> None:
    result(start(folder, KVBATON_TORCH_INDEX="https://index.example/cpu"))
    assert installed(tmp_path)[0] == "torch==2.13.* --extra-index-url https://index.example/cpu"


def test_changed_requirements_are_installed(tmp_path: Path, folder: Path, start: Setup) -> None:
    result(start(folder))
    installed(tmp_path)
    (folder / "pyproject.toml").write_text("[project]\n# changed\n")
    said = ["installing kvbaton[cluster]", "compiling the engine's kernels", "done"]
    assert result(start(folder)) == (0, said)


def test_two_runs_at_once_install_once(tmp_path: Path, folder: Path, start: Setup) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = start(folder, PIP_WAITS=str(gate))
    assert gate.read_text() == "reached\n"
    second = start(folder)
    assert second.stderr is not None
    assert second.stderr.readline() == "setup: waiting for another set-up of this folder\n"
    gate.write_text("go\n")
    assert gate.read_text() == "reached\n"  # the second package of the first run
    gate.write_text("go\n")
    assert result(first)[0] == 0
    assert result(second) == (0, [])
    assert len(installed(tmp_path)) == 2


def test_an_interrupted_run_is_repaired(tmp_path: Path, folder: Path, start: Setup) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    interrupted = start(folder, PIP_WAITS=str(gate))
    assert gate.read_text() == "reached\n"
    os.killpg(interrupted.pid, signal.SIGKILL)
    result(interrupted)
    installed(tmp_path)
    assert result(start(folder))[0] == 0
    assert installed(tmp_path) == ["torch==2.13.*", "--editable .[cluster]"]


def test_a_damaged_venv_is_made_anew(tmp_path: Path, folder: Path, start: Setup) -> None:
    result(start(folder))
    installed(tmp_path)
    (folder / ".venv/damaged").touch()
    status, said = result(start(folder, "dev"))
    assert status == 0
    assert "the packages are damaged; installing them anew" in said
    assert installed(tmp_path)[-3:] == [
        "torch==2.13.*",
        "--editable .[cluster,dev]",
        "--no-deps xformers==0.0.35",
    ]


def test_a_moved_folder_gets_a_venv_of_its_own(tmp_path: Path, folder: Path, start: Setup) -> None:
    result(start(folder))
    moved = folder.rename(tmp_path / "moved")
    status, said = result(start(moved))
    assert (status, said[0]) == (0, "making .venv with Python 3.11.0")


def test_a_venv_made_by_hand_is_kept(tmp_path: Path, folder: Path, start: Setup) -> None:
    subprocess.run([tmp_path / "python3.11", "-m", "venv", folder / ".venv"], check=True)
    assert result(start(folder))[1][0].startswith("installing torch")


def test_what_pip_says_is_shown_when_it_fails(folder: Path, start: Setup) -> None:
    status, said = result(start(folder, PIP_FAILS="1"))
    assert status == 1
    assert said[-2:] == [
        "no network",
        "pip install torch==2.13.* failed; run scripts/setup again to go on from here",
    ]


def test_without_python_it_says_what_to_do(folder: Path, start: Setup) -> None:
    (folder.parent / "python3.11").unlink()
    empty = folder.parent / "empty"
    empty.mkdir()
    for tool in ("bash", "env", "dirname", "sha256sum", "cat", "flock"):
        (empty / tool).symlink_to(f"/usr/bin/{tool}")
    status, said = result(start(folder, PATH=str(empty)))
    assert status == 1
    assert said == [
        "Python 3.11 or newer with venv is needed; install it (on Debian: python3 and "
        "python3-venv) or name it with KVBATON_PYTHON"
    ]


def test_without_a_compiler_it_sets_up_all_the_same(folder: Path, start: Setup) -> None:
    status, said = result(start(folder, NO_COMPILER="1"))
    assert (status, said[-1]) == (0, "done")
    assert "install g++" in said[-2]
    assert result(start(folder)) == (0, [])


def test_an_unknown_part_is_refused(folder: Path, start: Setup) -> None:
    assert result(start(folder, "all")) == (2, ["usage: scripts/setup [cluster|dev]"])
