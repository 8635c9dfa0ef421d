"""scripts/serve with stand-ins for the services: how it starts, fails, and ends everything."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from scripts.cluster.processes import descendants, readable
from tests.ports import free_cluster_port

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys
import scripts.cluster.honcho
import scripts.cluster.serve

scripts.cluster.honcho.STOP_TIMEOUT_S = float(sys.argv[1])
exec(sys.argv[2])
sys.exit(scripts.cluster.serve.main(sys.argv[3:]))
"""

# A signal at a moment when Python drops what its handler raises, and after all else but waiting.
SIGNAL_IN_A_FINALISER = """
import signal

show_hints = scripts.cluster.serve.show_hints

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

def then_a_signal(plan, screen):
    show_hints(plan, screen)
    Finalised()

scripts.cluster.serve.show_hints = then_a_signal
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

# What takes longer is told with what scripts/serve printed; a hung test would tell nothing.
PATIENCE_S = 60

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
    started: list[tuple[subprocess.Popen[str], threading.Timer]] = []

    def serve(
        *flags: str, stop_timeout_s: float = PATIENCE_S, before: str = "", **services: str
    ) -> "subprocess.Popen[str]":
        lines = [f"{name}: {command}\n" for name, command in services.items()]
        (folder / "Procfile").write_text("".join(lines))
        command = [sys.executable, "-P", str(folder / "driver.py"), str(stop_timeout_s), before]
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
        started.append((process, threading.Timer(PATIENCE_S, kill, [process])))
        started[-1][1].start()
        return process

    yield serve
    for process, end_of_patience in started:
        end_of_patience.cancel()
        kill(process)
        process.wait()
        if not out(process).closed:
            sys.stdout.write(f"not read by the test: {out(process).read()}")
            out(process).close()


def kill(process: "subprocess.Popen[str]") -> None:
    """End scripts/serve with all its descendants; stand-ins alone would live on."""
    if process.poll() is not None:
        return
    for info in descendants(process.pid):
        with suppress(ProcessLookupError):
            os.kill(info.pid, signal.SIGKILL)
    process.kill()


def out(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def gateway(folder: Path, status: int = 200) -> str:
    """A gateway that answers /ready with `status`."""
    return f"exec '{sys.executable}' -S '{folder}/gateway.py' {status}"


def holding(folder: Path, rest: str) -> str:
    """A service that holds the witness open for as long as any of its processes lives."""
    return f"exec 3> '{folder}/witness'; echo up >&3; {rest}"


def open_witness(folder: Path, process: "subprocess.Popen[str]") -> IO[str]:
    """The witness for reading, as soon as a service holds it."""
    witness = os.open(folder / "witness", os.O_RDONLY | os.O_NONBLOCK)
    serve = os.pidfd_open(process.pid)
    ready = readable([witness, serve])
    os.close(serve)
    if witness not in ready:
        os.close(witness)
        pytest.fail(f"scripts/serve ended with {process.wait()}: {out(process).read()}")
    os.set_blocking(witness, True)
    return os.fdopen(witness)


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
    port = free_cluster_port()
    process = serve(
        "--http-port",
        str(port),
        gateway=gateway(folder),
        decode=holding(folder, "exec sleep 1000"),
    )
    with open_witness(folder, process) as witness:
        text = read_until(out(process), "Ctrl-C stops everything.")
        process.send_signal(signum)
        assert witness.read() == "up\n", "read() ends when no process holds it any more"
    assert process.wait() == 0
    assert out(process).read() == "stopping\nstopped\n"
    assert text.startswith("kvbaton: 1 gateway, 1 kvstore, 1 prefill, 1 decode\n")
    assert f"OpenAI API  http://127.0.0.1:{port}/v1\n" in text


def test_a_signal_that_python_loses_stops_everything(folder: Path, serve: Serve) -> None:
    process = serve(
        "--http-port",
        str(free_cluster_port()),
        before=SIGNAL_IN_A_FINALISER,
        gateway=gateway(folder),
        decode=holding(folder, "exec sleep 1000"),
    )
    with open_witness(folder, process) as witness:
        assert "Exception ignored" in read_until(out(process), "scripts.cluster.serve.Stopped")
        assert witness.read() == "up\n"
    assert process.wait() == 0
    assert out(process).read().endswith("stopping\nstopped\n")


def test_what_ignores_the_stop_is_killed_with_all_its_children(folder: Path, serve: Serve) -> None:
    stubborn = holding(
        folder, "trap '' TERM INT HUP; sleep 1000 & (setsid sleep 1000) & sleep 1000"
    )
    process = serve(
        "--http-port",
        str(free_cluster_port()),
        stop_timeout_s=0.2,
        gateway=gateway(folder),
        decode=stubborn,
    )
    with open_witness(folder, process) as witness:
        read_until(out(process), "Ctrl-C stops everything.")
        process.terminate()
        assert witness.read() == "up\n"
    assert process.wait() == 0
    assert "stopped; had to kill" in out(process).read()


def test_a_stop_while_honcho_starts_leaves_nothing(folder: Path, serve: Serve) -> None:
    process = serve(
        "--http-port", str(free_cluster_port()), decode=holding(folder, "exec sleep 1000")
    )
    with open_witness(folder, process) as witness:
        assert witness.readline() == "up\n"
        process.terminate()
        assert witness.read() == ""
    assert process.wait() == 0


def test_nothing_outlives_a_killed_honcho(folder: Path, serve: Serve) -> None:
    process = serve(
        "--http-port",
        str(free_cluster_port()),
        gateway=gateway(folder),
        decode=holding(folder, "echo $PPID >&3; exec sleep 1000"),
    )
    with open_witness(folder, process) as witness:
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
    process = serve("--http-port", str(free_cluster_port()), decode=f"exec sh '{script}'")
    text, _ = process.communicate()
    assert process.returncode == 1
    assert "decode.1   Traceback: no such model\n" in text
    assert "scripts/serve: decode.1: ended with status 1\n" in text


def test_a_cluster_that_does_not_get_ready_is_given_up(folder: Path, serve: Serve) -> None:
    port = free_cluster_port()
    process = serve("--http-port", str(port), "--start-timeout", "0", gateway=gateway(folder, 503))
    text, _ = process.communicate()
    assert process.returncode == 1
    assert "scripts/serve: not ready after 0 s: the gateway starts\n" in text


def test_what_the_gateway_waits_for_is_shown(folder: Path, serve: Serve) -> None:
    process = serve("--http-port", str(free_cluster_port()), gateway=gateway(folder, 503))
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
