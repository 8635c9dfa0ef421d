"""The units as systemd reads them: nothing to complain of, and how much of the host they can reach."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.host.layout import unit_names
from tests.packaging.units import Installed

ROOT = Path(__file__).parents[2]
ROLES = ("gateway", "kvstore", "prefill", "decode")
# What `systemd-analyze security` may give at most: from 0, nothing can be reached, to 10. What the
# workers have more is for machine code that is made as they run, and for GPUs.
MOST_EXPOSURE = {"gateway": 2.0, "kvstore": 2.0, "prefill": 2.5, "decode": 2.5}
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


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *args], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"SYSTEMD_LOG_COLOR": "0", "SYSTEMD_COLORS": "0"},
    )  # fmt: skip


@needs_systemd
def test_systemd_understands_every_line(installed: Installed) -> None:
    names = [*unit_names(dict.fromkeys(ROLES, 1)), "kvbaton.target", "kvbaton.slice"]
    done = analyze("verify", "--man=no", f"--root={installed.root}", *names)
    said = [line for line in done.stderr.splitlines() if "kvbaton" in line]
    unknown = re.compile(rf"Unknown key.*'({'|'.join(SINCE_254)})' in section 'Service'")
    assert [line for line in said if not unknown.search(line)] == []


@needs_systemd
@pytest.mark.parametrize("role", ROLES)
def test_a_service_reaches_little_of_the_host(installed: Installed, role: str) -> None:
    done = analyze(
        "security", "--offline=true", f"--root={installed.root}", "--no-pager",
        f"--threshold={MOST_EXPOSURE[role] * 10:.0f}", f"kvbaton-{role}@1.service",
    )  # fmt: skip
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stderr
    assert float(exposure[1]) <= MOST_EXPOSURE[role], done.stdout
    assert done.returncode == 0


def test_prefill_and_decode_differ_in_nothing_but_their_name() -> None:
    prefill, decode = (
        (ROOT / f"scripts/systemd/kvbaton-{role}@.service").read_text()
        for role in ("prefill", "decode")
    )
    assert prefill.replace("prefill", "decode") == decode


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
