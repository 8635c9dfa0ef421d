"""The keeper: it restarts what crashes, passes a stop on, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from scripts.cluster.keeper import Backoff, describe_exit

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import os, signal, sys
from scripts.cluster.keeper import Backoff, Log, Reasons, honcho_above, keep
from scripts.cluster.processes import die_with_parent

die_with_parent(signal.SIGTERM)
reasons = Reasons(honcho_above(os.environ))
log = Log("fake.1")
backoff = Backoff(first_s=0.001, longest_s=0.01)
stop_timeout_s = float(os.environ.get("STOP_TIMEOUT_S", "60"))
command = sys.argv[1:]
sys.exit(keep(command, os.environ, reasons, log, backoff=backoff, stop_timeout_s=stop_timeout_s))
"""

# Says who it is and which signals it gets; ends at SIGTERM only when told to as its argument.
SERVICE = """
import os, signal, sys

def on_signal(signum, frame):
    print(signal.Signals(signum).name, flush=True)
    if sys.argv[1:] == ["obey"]:
        sys.exit(0)

signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)
print("up", os.getpid(), flush=True)
while True:
    signal.pause()
"""

Keep = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def service(tmp_path: Path) -> list[str]:
    """The command of a service that runs until it is told to stop."""
    script = tmp_path / "a service.py"
    script.write_text(SERVICE)
    return [sys.executable, "-S", str(script)]


def keeper_command(tmp_path: Path, command: list[str]) -> list[str]:
    """The command of a keeper with tiny time-outs for a service's command."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    return [sys.executable, "-S", str(driver), *command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Keep]:
    """Starts processes that print to one pipe each, in sessions of their own."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **options: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        out(process).close()


def out(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def events(text: str) -> list[dict[str, str]]:
    """The keeper's own lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_wait_doubles_up_to_a_limit_and_a_good_life_resets_it() -> None:
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    assert [backoff.after(30.0), backoff.after(29.9), backoff.after(0)] == [0.5, 1, 2]


def test_an_exit_is_told_in_words() -> None:
    assert describe_exit(3) == "ended with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL (by hand, or because memory ran out)"
    assert describe_exit(-15) == "was killed by SIGTERM"
    assert describe_exit(-40) == "was killed by signal 40"


def test_a_crashing_service_is_started_again_and_again(tmp_path: Path, start: Keep) -> None:
    crashing = ["/bin/sh", "-c", "echo up; kill -9 $$"]
    keeper = start(keeper_command(tmp_path, crashing))
    lines = [out(keeper).readline() for _ in range(6)]
    keeper.terminate()
    assert keeper.wait() == 0
    assert lines[::2] == ["up\n"] * 3
    crash = json.loads(lines[1])
    assert (crash["service"], crash["event"]) == ("fake.1", "service_crashed")
    assert crash["message"] == (
        "was killed by SIGKILL (by hand, or because memory ran out); starting it again in 0.001 s"
    )


@pytest.mark.parametrize("status", [2, os.EX_CONFIG])
def test_wrong_settings_are_final(tmp_path: Path, start: Keep, status: int) -> None:
    keeper = start(keeper_command(tmp_path, ["/bin/sh", "-c", f"echo why; exit {status}"]))
    text, _ = keeper.communicate()
    assert keeper.returncode == status
    assert text.startswith("why\n")
    assert [event["event"] for event in events(text)] == ["service_misconfigured"]


def test_a_command_that_cannot_run_is_final(tmp_path: Path, start: Keep) -> None:
    keeper = start(keeper_command(tmp_path, [str(tmp_path / "missing")]))
    text, _ = keeper.communicate()
    assert keeper.returncode == os.EX_CONFIG
    assert "No such file" in text


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_is_passed_on_and_the_drained_service_is_awaited(
    tmp_path: Path, start: Keep, service: list[str], signum: signal.Signals
) -> None:
    keeper = start(keeper_command(tmp_path, [*service, "obey"]))
    assert out(keeper).readline().startswith("up")
    keeper.send_signal(signum)
    text, _ = keeper.communicate()
    assert (keeper.returncode, text) == (0, "SIGTERM\n")


def test_a_service_that_ignores_the_stop_hears_it_once_and_is_killed(
    tmp_path: Path, start: Keep, service: list[str]
) -> None:
    keeper = start(keeper_command(tmp_path, service), STOP_TIMEOUT_S="0.1")
    assert out(keeper).readline().startswith("up")
    os.killpg(keeper.pid, signal.SIGTERM)  # as honcho does, to the whole group
    assert out(keeper).readline() == "SIGTERM\n"
    os.killpg(keeper.pid, signal.SIGTERM)
    os.killpg(keeper.pid, signal.SIGINT)
    text, _ = keeper.communicate()
    assert keeper.returncode == 1
    (event,) = events(text)
    assert "SIGTERM\n" not in text
    assert event["message"] == "got SIGTERM; not done in 0.1 s, so killed"


def test_a_stop_right_after_the_start_is_not_lost(start: Keep) -> None:
    code = (
        "from scripts.cluster.keeper import Child, Reasons\n"
        "Reasons(None)\n"
        "print(Child(['/bin/sleep', '1000'], {}).stop(60))\n"
    )
    text, _ = start([sys.executable, "-c", code]).communicate()
    assert text == "(-15, True)\n"


def test_the_service_dies_with_its_keeper(tmp_path: Path, start: Keep, service: list[str]) -> None:
    keeper = start(keeper_command(tmp_path, service))
    assert out(keeper).readline().startswith("up")
    keeper.kill()
    assert out(keeper).read() == "", "the pipe ends when the last process that holds it has ended"


def test_keeper_and_service_end_with_what_started_them(
    tmp_path: Path, start: Keep, service: list[str]
) -> None:
    keeper = keeper_command(tmp_path, [*service, "obey"])
    parent = start(["/bin/sh", "-c", '"$@" & wait', "sh", *keeper])
    assert out(parent).readline().startswith("up")
    parent.kill()
    assert out(parent).read() == "SIGTERM\n"


def test_nothing_outlives_a_killed_honcho(tmp_path: Path, start: Keep, service: list[str]) -> None:
    """honcho's children sit in sessions of their own, below a process that lives on without it."""
    log = tmp_path / "log"
    os.mkfifo(log)
    command = " ".join(f"'{word}'" for word in keeper_command(tmp_path, service))
    (tmp_path / "Procfile").write_text(f"fake: exec {command} > log 2>&1\n")
    honcho = start([sys.executable, "-m", "honcho", "start"], STOP_TIMEOUT_S="0.1")
    with log.open() as lines:
        assert lines.readline().startswith("up")
        honcho.kill()
        assert lines.readline() == "SIGTERM\n"
        (event,) = events(lines.read())
    assert event["message"] == "honcho is gone; not done in 0.1 s, so killed"
    assert "Traceback" not in out(honcho).read(), "read() ends when honcho's children have ended"
