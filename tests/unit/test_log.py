"""Logs: JSON, or the journal's fields where stderr goes there; the level changes at any time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.journal import VARIABLE, Journal, datagram, is_journal

ROOT = Path(__file__).parents[2]
PATIENCE_S = 10.0

PROCESS = """
import sys
from pathlib import Path
import structlog
from common.log import change_log_level, configure_logging

log = structlog.get_logger()
configure_logging("info", "decode.2", Path(sys.argv[1]))
log.debug("too_quiet")
log.info("handoff_claimed", request="0123abcd", num_blocks=3)
bound = structlog.get_logger().bind(store=1)
change_log_level("debug")
log.debug("heard", text="a\\nb")
bound.debug("heard_too")
change_log_level("error")
log.warning("too_quiet")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("step_failed")
"""


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """Takes datagrams as journald does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.settimeout(PATIENCE_S)
        server.bind(str(tmp_path / "journal"))
        yield server


def fields(datagram: bytes) -> dict[str, str]:
    """What the journal reads in a datagram."""
    found = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + size], datagram[8 + size :]
            assert datagram[:1] == b"\n"
            datagram = datagram[1:]
        found[name.decode()] = value.decode()
    return found


def run(path: Path, stderr: int, **environ: str) -> None:
    """A process that logs."""
    subprocess.run(
        [sys.executable, "-c", PROCESS, str(path)],
        cwd=ROOT,
        stderr=stderr,
        check=True,
        env=os.environ | environ,
    )


def test_under_systemd_each_event_is_a_datagram_with_its_fields(
    tmp_path: Path, journald: socket.socket
) -> None:
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        status = os.fstat(stderr.fileno())
        run(tmp_path / "journal", stderr.fileno(), **{VARIABLE: f"{status.st_dev}:{status.st_ino}"})
    assert log.read_text() == ""
    events = [fields(journald.recv(65536)) for _ in range(5)]
    assert events[0] == {
        "PRIORITY": "6",
        "MESSAGE": "handoff_claimed request=0123abcd num_blocks=3",
        "SYSLOG_IDENTIFIER": "decode.2",
        "REQUEST_ID": "0123abcd",
        "KVBATON_NUM_BLOCKS": "3",
        "KVBATON_EVENT": "handoff_claimed",
    }
    assert [event["KVBATON_EVENT"] for event in events[1:]] == [
        "log_level_changed",
        "heard",
        "heard_too",
        "step_failed",
    ]
    assert [event["PRIORITY"] for event in events[1:]] == ["4", "7", "7", "3"]
    assert events[2]["KVBATON_TEXT"] == "a\nb"
    assert events[3]["KVBATON_STORE"] == "1"
    assert "ZeroDivisionError" in events[4]["KVBATON_EXCEPTION"]
    assert "ZeroDivisionError" in events[4]["MESSAGE"]


def test_elsewhere_each_event_is_a_line_of_json_whatever_systemd_says_of_others(
    tmp_path: Path,
) -> None:
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        run(tmp_path / "journal", stderr.fileno(), **{VARIABLE: "1:2"})
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "handoff_claimed",
        "log_level_changed",
        "heard",
        "heard_too",
        "step_failed",
    ]
    assert {event["service"] for event in events} == {"decode.2"}
    assert (events[0]["request"], events[0]["level"]) == ("0123abcd", "info")
    assert events[1]["now"] == "debug"


@pytest.mark.parametrize(("name", "size"), [("nobody", 1), ("journal", 1 << 24)])
def test_what_the_journal_does_not_take_is_a_line_with_its_priority(
    tmp_path: Path, journald: socket.socket, name: str, size: int
) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        journal = Journal(tmp_path / name, stderr)
        journal.warning(event="it_is", level="warning", text="x" * size)
        journal.close()
        stderr.seek(0)
        line = stderr.read()
    assert line.startswith('<4>{"event": "it_is"')
    assert json.loads(line[3:])["text"] == "x" * size


def test_names_are_such_as_the_journal_takes() -> None:
    event = {"event": "x", "level": "info", "töken-Rate": 1.5, "k" * 80: None, "trace": "t"}
    assert fields(datagram(event)).keys() == {
        "PRIORITY",
        "MESSAGE",
        "KVBATON_EVENT",
        "KVBATON_T_KEN_RATE",
        "KVBATON_" + "K" * 56,
        "TRACE_ID",
    }


def test_a_stream_is_the_journals_only_if_systemd_named_that_very_one(tmp_path: Path) -> None:
    with (tmp_path / "one").open("w") as one, (tmp_path / "other").open("w") as other:
        status = os.fstat(one.fileno())
        environ = {VARIABLE: f"{status.st_dev}:{status.st_ino}"}
        assert is_journal(one, environ)
        assert not is_journal(other, environ)
        assert not is_journal(one, {})
        assert not is_journal(one, {VARIABLE: "nonsense"})
