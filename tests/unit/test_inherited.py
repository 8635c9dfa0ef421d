"""The listening socket that a process is given at its start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.inherited import take_listener

ROOT = Path(__file__).parents[2]

CHILD = """
import os
from common.config import StartError
from common.inherited import take_listener
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
try:
    listener = take_listener(environ, os.getpid())
except StartError as error:
    print(error)
else:
    print(listener.getsockname()[1], os.get_inheritable(3), environ)
    listener.close()
"""


def child(inherited: socket.socket) -> str:
    """What a process says of the socket that is its descriptor 3."""
    command = 'exec 3<&"$1"; exec "$2" -c "$3"'
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(inherited.fileno()), sys.executable, CHILD],
        cwd=ROOT,
        pass_fds=[inherited.fileno()],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_listening_socket_is_taken_and_not_passed_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert child(listener) == f"{listener.getsockname()[1]} False {{}}"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_of_another_kind_is_refused(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        assert child(other).startswith("the inherited socket takes no connections")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_what_is_not_for_us_is_left_alone(environ: dict[str, str]) -> None:
    assert take_listener(environ, os.getpid()) is None
    assert environ == {}


def test_one_socket_is_all_that_is_taken() -> None:
    from common.config import StartError

    with pytest.raises(StartError, match="takes one inherited socket, got 2"):
        take_listener({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, 7)
