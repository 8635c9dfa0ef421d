"""`python -m kvbaton` against a running face: what people and programs see, and the exit status."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.messages import AskStatus, Message, Ok, SetLogLevel, StatusTold
from kvbaton.__main__ import main
from kvbaton.errors import ConnectionLostError, KvbatonError
from kvbaton.operations import MemberStatus, StoreStatus
from services.gateway.clients.face import ClientFace
from tests.net.gateways import PATIENCE_S, running_face
from tests.net.test_client_face_admin import FakeLink, store
from tests.unit.gateway_fakes import FakeBackend, says

ROOT = Path(__file__).parents[2]
KEY = "a key for these tests"
BLOCKS = {"free": 3, "committed": 1}
TOLD = StatusTold(
    status=StoreStatus(name="kvstore.1", version="0.1.0", age_s=90061, num_blocks=4, blocks=BLOCKS),
    members=[
        MemberStatus(
            member_id="ab" * 16,
            name="decode.1",
            role="decode",
            state="ready",
            version="0.1.0",
            age_s=61.5,
            pid=1,
            num_running=2,
            num_places=64,
            tokens_per_s=123.4,
        ),
        MemberStatus(member_id="cd" * 16, name="gateway.1", role="gateway", state="ready", pid=2),
    ],
)


def healthy(message: Message) -> Message | KvbatonError | None:
    if isinstance(message, AskStatus):
        return TOLD
    assert isinstance(message, SetLogLevel)
    return Ok()


def deaf(message: Message) -> Message | KvbatonError | None:
    return TOLD if isinstance(message, AskStatus) else ConnectionLostError("no answer in time")


@asynccontextmanager
async def face_of(*answers: object) -> AsyncIterator[tuple[ClientFace, list[FakeLink]]]:
    """A face before stores that answer so."""
    stores = [store(index, answer) for index, answer in enumerate(answers)]  # type: ignore[arg-type]
    backend = FakeBackend(lambda _: says("tweet"))
    async with running_face(backend, admin_key=KEY, stores=[each for each, _ in stores]) as face:
        yield face, [link for _, link in stores]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY)
    return path


async def command(face: ClientFace, key_file: Path | None, *arguments: str) -> int:
    flags = ["--gateway", face.endpoint, "--keys", ""]
    flags += ["--admin-key-file", str(key_file)] if key_file else []
    return await asyncio.to_thread(main, [arguments[0], *flags, *arguments[1:]])


async def test_status_shows_members_and_stores(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with face_of(healthy, lambda _: ConnectionLostError("no answer")) as (face, _):
        assert await command(face, key_file, "status") == 1  # a store did not answer
        rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
        assert await command(face, key_file, "status", "--json") == 1
        answer = json.loads(capsys.readouterr().out)
    assert rows[2:] == [
        "gateway.1 gateway ready 0 0 cdcdcdcd",
        "decode.1 decode ready 2 0 64 0 123 1 min 1 s 0.1.0 abababab",
        "KV store 1 at tcp://store: no answer",
        "KV store endpoint blocks free committed handoffs waiting age version",
        "kvstore.1 tcp://store 4 3 1 0 0 1 d 1 h 0.1.0",
    ]
    assert [each["name"] for each in answer["members"]] == ["gateway.1", "decode.1"]
    assert answer["stores"][0]["blocks"] == BLOCKS


async def test_log_level_names_who_has_it_and_who_could_not_be_told(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with face_of(healthy) as (face, (link,)):
        assert await command(face, key_file, "log-level", "kvstore.1", "debug") == 0
        assert capsys.readouterr().out == "level debug: kvstore.1\n"
        said = link.asked[-1]
        assert isinstance(said, SetLogLevel)
        assert (said.level, said.member_ids) == ("debug", [])
        assert await command(face, key_file, "log-level", "gateway.1", "info", "--json") == 0
        assert json.loads(capsys.readouterr().out)["names"] == ["gateway.1"]
        said = link.asked[-1]
        assert isinstance(said, SetLogLevel)
        assert said.member_ids == ["cd" * 16]
        assert await command(face, key_file, "log-level", "kvstor.1", "info") == 2
        assert "there is no member kvstor.1; did you mean kvstore.1?" in capsys.readouterr().err
    async with face_of(deaf) as (face, _):
        assert await command(face, key_file, "log-level", "kvstore.1", "debug") == 1
        assert capsys.readouterr().out == "kvstore.1 could not be told: no answer in time\n"


async def test_a_command_that_is_refused_says_why_and_what_to_do(
    key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another key than theirs")
    async with face_of(healthy) as (face, links):
        for name in (["status"], ["top"], ["drain", "x"], ["log-level", "all", "debug"]):
            assert await command(face, wrong, *name) == 2
            said = capsys.readouterr().err
            assert f"kvbaton {name[0]}: this is not the gateway's admin key" in said
            assert str(wrong) in said
        assert links[0].asked == []
        assert await command(face, key_file, "drain", "decode.7", "--json") == 2
        said = capsys.readouterr().err
        assert said == "kvbaton drain: there is no worker decode.7; there are none\n"
    with pytest.raises(SystemExit):
        main(["log-level", "all", "loud"])
    with pytest.raises(SystemExit):
        main(["top", "--interval", "0"])


async def test_ask_streams_a_completion_and_says_how_fast_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with face_of() as (face, _):
        assert await command(face, None, "ask", "x", "--max-tokens", "5") == 0
        said = capsys.readouterr()
        assert said.out == "tweet\n"
        figures = r"TTFT [\d.]+ ms, TPOT [\d.]+ ms, \d+ tokens, length, request \w+\n"
        assert re.fullmatch(figures, said.err)
        monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
        assert await command(face, None, "ask", "-", "--json", "--seed", "1") == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["text"], answer["finish_reason"]) == ("tweet", "length")
        assert answer["ttft_ms"] > 0
        assert answer["usage"]["num_output_tokens"] > 1
        assert await command(face, None, "ask", "hello", "--chat") == 0
        assert capsys.readouterr().out == "tweet\n"
        assert await command(face, None, "ask", "x", "--max-tokens", "0") == 2
        assert "kvbaton ask: max_tokens must be" in capsys.readouterr().err


def test_bench_points_to_where_benchmarks_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("scripts/bench CASE")
    assert (ROOT / "scripts" / "bench").exists()


async def test_top_is_the_status_once_where_nobody_watches(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with face_of(healthy) as (face, (link,)):
        assert await command(face, key_file, "top") == 0
        assert len(link.asked) == 1
    assert capsys.readouterr().out.isascii()


def on_terminal(endpoint: str, key_file: Path, keys: bytes, *, plain: bool) -> tuple[int, str]:
    """Run `top` on a terminal until it has drawn twice, then press keys. Returns the exit status
    and what was drawn."""
    flags = ["--gateway", endpoint, "--keys", "", "--admin-key-file", str(key_file)]
    program = [
        "import os, signal, sys",
        # Tests may run in the background of a script, where what they start ignores Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "os.open(os.ttyname(0), os.O_RDWR)",  # it becomes ours: Ctrl-C is a signal
        "sys.modules['rich.live'] = None" if plain else "",
        "from kvbaton.__main__ import main",
        "sys.exit(main())",
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(program), "top", "--interval", "0.05", *flags],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )
    os.close(theirs)
    drawn = b""
    while drawn.count(b"decode.1") < 2:
        ready, _, _ = select.select([ours], [], [], PATIENCE_S)
        assert ready, drawn
        drawn += os.read(ours, 65536)
    os.write(ours, keys)
    while select.select([ours], [], [], PATIENCE_S)[0]:
        try:
            drawn += os.read(ours, 65536)
        except OSError:  # it has ended, and nobody has the terminal any more
            break
    os.close(ours)
    return process.wait(PATIENCE_S), drawn.decode()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("keys", [b"q", b"\x03"])
async def test_top_redraws_on_a_terminal_until_q_or_ctrl_c(
    key_file: Path, keys: bytes, plain: bool
) -> None:
    async with face_of(healthy) as (face, (link,)):
        status, drawn = await asyncio.to_thread(
            on_terminal, face.endpoint, key_file, keys, plain=plain
        )
    assert (status, len(link.asked) >= 2) == (0, True), drawn
    assert "kvstore.1" in drawn
    assert "Traceback" not in drawn
