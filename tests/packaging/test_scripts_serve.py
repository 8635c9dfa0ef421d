"""scripts/serve with stand-ins for the services: how it starts, fails, and ends everything."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys
import scripts.cluster.honcho
import scripts.cluster.serve

scripts.cluster.honcho.STOP_TIMEOUT_S = float(sys.argv[1])
sys.exit(scripts.cluster.serve.main(sys.argv[2:]))
"""

GATEWAY = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[1]))
        self.end_headers()
        self.wfile.write(json.dumps({"error": {"message": "no decode worker"}}).encode())

    def log_message(self, *args):
        pass

address = ("127.0.0.1", int(os.environ["KVBATON_HTTP_PORT"]))
http.server.HTTPServer(address, Handler).serve_forever()
"""

Serve = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder, in a path with a blank, for the stand-ins."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER)
    (folder / "gateway.py").write_text(GATEWAY)
    os.mkfifo(folder / "witness")
    return folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Starts scripts/serve with one line of a Procfile for each service given."""
    started: list[subprocess.Popen[str]] = []

    def serve(*flags: str, stop_timeout_s: float = 60, **services: str) -> "subprocess.Popen[str]":
        lines = [f"{name}: {command}\n" for name, command in services.items()]
        (folder / "Procfile").write_text("".join(lines))
        command = [sys.executable, "-P", str(folder / "driver.py"), str(stop_timeout_s)]
        process = subprocess.Popen(
            [*command, "--no-sample", "--procfile", str(folder / "Procfile"), *flags],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Tests may run under nohup, which scripts/serve heeds: it would not end at SIGHUP.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
        )
        started.append(process)
        return process

    yield serve
    for process in started:
        process.kill()
        process.wait()
        out(process).close()


def out(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def gateway(folder: Path, status: int = 200) -> str:
    """A gateway that answers /ready with `status`."""
    return f"exec '{sys.executable}' -S '{folder}/gateway.py' {status}"


def holding(folder: Path, rest: str) -> str:
    """A service that holds the witness open for as long as any of its processes lives."""
    return f"exec 3> '{folder}/witness'; echo up >&3; {rest}"


def read_until(lines: IO[str], end: str) -> str:
    """The lines up to one that starts with `end`."""
    text = ""
    for line in lines:
        text += line
        if line.startswith(end):
            return text
    pytest.fail(f"no line {end!r} in {text}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(folder: Path, serve: Serve, signum: signal.Signals) -> None:
    port = free_port()
    process = serve(
        "--http-port",
        str(port),
        gateway=gateway(folder),
        decode=holding(folder, "exec sleep 1000"),
    )
    with (folder / "witness").open() as witness:
        text = read_until(out(process), "Ctrl-C stops everything.")
        process.send_signal(signum)
        assert witness.read() == "up\n", "read() ends when no process holds it any more"
    assert process.wait() == 0
    assert out(process).read() == "stopping\nstopped\n"
    assert text.startswith("kvbaton: 1 gateway, 1 kvstore, 1 prefill, 1 decode\n")
    assert f"OpenAI API  http://127.0.0.1:{port}/v1\n" in text


def test_what_ignores_the_stop_is_killed_with_all_its_children(folder: Path, serve: Serve) -> None:
    stubborn = holding(
        folder, "trap '' TERM INT HUP; sleep 1000 & (setsid sleep 1000) & sleep 1000"
    )
    process = serve(
        "--http-port",
        str(free_port()),
        stop_timeout_s=0.2,
        gateway=gateway(folder),
        decode=stubborn,
    )
    with (folder / "witness").open() as witness:
        read_until(out(process), "Ctrl-C stops everything.")
        process.terminate()
        assert witness.read() == "up\n"
    assert process.wait() == 0
    assert "stopped; had to kill" in out(process).read()


def test_a_stop_while_honcho_starts_leaves_nothing(folder: Path, serve: Serve) -> None:
    process = serve("--http-port", str(free_port()), decode=holding(folder, "exec sleep 1000"))
    with (folder / "witness").open() as witness:
        assert witness.readline() == "up\n"
        process.terminate()
        assert witness.read() == ""
    assert process.wait() == 0


def test_nothing_outlives_a_killed_honcho(folder: Path, serve: Serve) -> None:
    process = serve(
        "--http-port",
        str(free_port()),
        gateway=gateway(folder),
        decode=holding(folder, "echo $PPID >&3; exec sleep 1000"),
    )
    with (folder / "witness").open() as witness:
        read_until(out(process), "Ctrl-C stops everything.")
        witness.readline()
        runner = int(witness.readline())
        honcho = int(Path(f"/proc/{runner}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(honcho, signal.SIGKILL)
        assert witness.read() == ""
    assert process.wait() == 1
    assert out(process).read() == "scripts/serve: honcho ended\nstopping\nstopped\n"


def test_a_crash_at_the_start_is_told_with_what_was_logged(folder: Path, serve: Serve) -> None:
    crash = '{"event": "service_crashed", "level": "warning", "message": "ended with status 1"}'
    script = folder / "decode.sh"
    script.write_text(f"echo 'Traceback: no such model'\necho '{crash}'\nexec sleep 1000\n")
    process = serve("--http-port", str(free_port()), decode=f"exec sh '{script}'")
    text, _ = process.communicate()
    assert process.returncode == 1
    assert "decode.1   Traceback: no such model\n" in text
    assert "scripts/serve: decode.1: ended with status 1\n" in text


def test_a_cluster_that_does_not_get_ready_is_given_up(folder: Path, serve: Serve) -> None:
    port = free_port()
    process = serve("--http-port", str(port), "--start-timeout", "0", gateway=gateway(folder, 503))
    text, _ = process.communicate()
    assert process.returncode == 1
    assert "scripts/serve: not ready after 0 s: the gateway starts\n" in text


def test_what_the_gateway_waits_for_is_shown(folder: Path, serve: Serve) -> None:
    process = serve("--http-port", str(free_port()), gateway=gateway(folder, 503))
    read_until(out(process), "waiting: no decode worker\n")
    process.terminate()
    assert process.wait() == 0


def test_a_taken_port_is_named_before_anything_starts(folder: Path, serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        process = serve("--http-port", str(port), decode=holding(folder, "exec sleep 1000"))
        text, _ = process.communicate()
    assert process.returncode == 2
    assert text.startswith(
        f"scripts/serve: port {port} (HTTP) is taken: stop what uses it, or choose other ports "
        "with --http-port 80"
    )


def test_the_script_itself_works_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()  # must not be taken for the real one
    (tmp_path / "scripts/__init__.py").touch()
    command = [str(ROOT / "scripts/serve"), "--help"]
    text = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert text.startswith("usage: scripts/serve")
