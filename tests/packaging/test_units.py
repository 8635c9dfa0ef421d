"""The units as systemd reads them: all is understood, and little of the host can be reached."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.worker.config import WorkerConfig
from scripts.host.layout import unit_names
from services.gateway.config import GatewayConfig
from services.kvstore.config import StoreConfig
from tests.packaging.units import Installed

ROOT = Path(__file__).parents[2]
ROLES = ("gateway", "kvstore", "prefill", "decode")
# What `systemd-analyze security` may give at most: from 0, nothing can be reached, to 10.
MOST_EXPOSURE = 2.0
SINCE_254 = ("RestartSteps", "RestartMaxDelaySec")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not here: on Debian, apt-get install systemd",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("root")
    command = [str(ROOT / "scripts/install"), "--root", str(root), "--venv", sys.prefix]
    subprocess.run(command, check=True, capture_output=True)
    return Installed(root)


def analyze(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run("systemd-analyze", *args, **environ)


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"SYSTEMD_COLORS": "0"} | environ,
    )


@needs_systemd
def test_systemd_understands_every_line(installed: Installed, tmp_path: Path) -> None:
    """Beside the units that come with it, and with every path where it is in the scratch root."""
    shutil.copytree(installed.units, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            path.write_text(installed.moved(path.read_text()))
    names = [*unit_names(dict.fromkeys(ROLES, 1)), "kvbaton.target", "kvbaton.slice"]
    done = analyze("verify", "--man=no", *names, SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    said = [line for line in done.stderr.splitlines() if "kvbaton" in line]
    later = re.compile(rf"Unknown key '({'|'.join(SINCE_254)})' in section \[Service\]")
    assert [line for line in said if not later.search(line)] == []
    assert done.stdout == ""


@needs_systemd
@pytest.mark.parametrize("role", ROLES)
def test_a_service_reaches_little_of_the_host(installed: Installed, role: str) -> None:
    done = analyze(
        "security", "--offline=true", f"--root={installed.root}", "--no-pager",
        f"--threshold={MOST_EXPOSURE * 10:.0f}", f"kvbaton-{role}@1.service",
    )  # fmt: skip
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stderr
    assert float(exposure[1]) <= MOST_EXPOSURE, done.stdout
    assert done.returncode == 0


def test_prefill_and_decode_differ_in_nothing_but_their_name() -> None:
    prefill, decode = (
        (ROOT / f"scripts/systemd/kvbaton-{role}@.service").read_text()
        for role in ("prefill", "decode")
    )
    assert prefill.replace("prefill", "decode") == decode


def test_every_setting_that_is_given_is_one(installed: Installed) -> None:
    """In the units, and in the files that are there to be edited."""
    configs = (GatewayConfig, StoreConfig, WorkerConfig)
    known = {f"KVBATON_{each.name.upper()}" for cls in configs for each in dataclasses.fields(cls)}
    given = set()
    for folder in (installed.units, installed.root / "etc/kvbaton"):
        for path in folder.rglob("*.*"):
            if path.is_file():
                given |= set(re.findall(r"\b(KVBATON_\w+)=", path.read_text()))
    assert len(given) > 10
    assert given - known == set()


@needs_systemd
def test_the_user_and_the_folders_are_made(installed: Installed, tmp_path: Path) -> None:
    root = f"--root={tmp_path}"
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", root, str(installed.root / "etc/sysusers.d/kvbaton.conf"))
    assert made.returncode == 0, made.stderr
    (entry,) = [
        line.split(":")
        for line in (tmp_path / "etc/passwd").read_text().splitlines()
        if line.startswith("kvbaton:")
    ]
    assert 0 < int(entry[2]) < 1000, "logind removes the shared memory of other users"
    conf = str(installed.root / "etc/tmpfiles.d/kvbaton.conf")
    made = run("systemd-tmpfiles", "--create", root, conf)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "etc/kvbaton").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("role", ROLES)
def test_what_keeps_the_arena_and_ends_in_time(installed: Installed, role: str) -> None:
    unit = installed.unit(role)
    assert unit["User"] == ["kvbaton"]
    assert "DynamicUser" not in unit, "it implies RemoveIPC=yes, which deletes the arena"
    assert unit["RemoveIPC"] == ["no"]
    assert unit["TimeoutStopSec"] == ["180"]
    assert unit["Restart"] == ["on-failure"]
    assert "KVBATON_DRAIN_S=170" in unit["Environment"]
    assert "AF_NETLINK" in unit["RestrictAddressFamilies"][0].split(), "libzmq aborts without"
