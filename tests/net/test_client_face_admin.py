"""Audit and why on real ZeroMQ: a running gateway's face before stores that a test makes up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from common.messages import AskAudit, AskWhy, Audited, Message, Told
from common.net.link import Link
from kvbaton import protocol
from kvbaton.__main__ import main
from kvbaton.admin import HistoryEvent, StoreAudit, StoreHistory
from kvbaton.errors import ConnectionLostError, KvbatonError
from kvbaton.protocol import Audit, Cancel, Error, Ping, Pong, Why
from services.gateway.routing.peers import Store
from tests.net.gateways import FakeClock, RawClient, raw_client, running_face
from tests.unit.gateway_fakes import FakeBackend

KEY = "a key for these tests"


class FakeLink:
    """A link to a store: `answer` gives what each call returns or raises; None: nothing comes."""

    def __init__(self, answer: Callable[[Message], Message | KvbatonError | None]) -> None:
        self.endpoint = "tcp://store"
        self.asked: list[Message] = []
        self.cancelled = asyncio.Event()
        self._answer = answer

    async def call(self, message: Message, timeout_s: float) -> Message:
        assert timeout_s > 0
        self.asked.append(message)
        answer = self._answer(message)
        if answer is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if isinstance(answer, KvbatonError):
            raise answer
        assert answer is not None
        return answer


def store(
    index: int, answer: Callable[[Message], Message | KvbatonError | None]
) -> tuple[Store, FakeLink]:
    link = FakeLink(answer)
    made = Store(index, is_up=True)
    made.link = cast(Link, link)
    return made, link


def closing(message: Message) -> Message:
    """A store of four free blocks, which remembers one event."""
    if isinstance(message, AskAudit):
        return Audited(audit=StoreAudit(num_blocks=4, blocks={"free": 4}))
    assert isinstance(message, AskWhy)
    event = HistoryEvent(age_s=1.0, event="blocks_leased", num_blocks=1, blocks=[(2, 1)])
    return Told(history=StoreHistory(events=[event]))


async def refused(client: RawClient, message: Any) -> Error:
    answer = await client.ask(message)
    assert isinstance(answer, Error)
    return answer


async def test_without_a_key_every_question_is_refused_with_a_remedy() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        await client.hello()
        for message in (Audit(id=1, admin_key=""), Why(id=1, admin_key=KEY, block=1)):
            error = await refused(client, message)
            assert (error.id, error.code, error.field) == (1, "forbidden", "admin_key")
            assert "start it with --admin-key-file FILE, made with (umask 077;" in error.message


async def test_a_wrong_key_is_refused_and_the_log_is_not_flooded() -> None:
    clock = FakeClock()
    made, link = store(0, closing)
    with capture_logs() as logs:
        async with (
            running_face(FakeBackend(), clock=clock, admin_key=KEY, stores=[made]) as face,
            raw_client(face.endpoint) as client,
        ):
            await client.hello()
            for number in range(30):
                error = await refused(client, Audit(id=number, admin_key=KEY[:-1]))
                assert (error.id, error.code) == (number, "forbidden")
            clock.time = 11.0
            await refused(client, Why(id=1, admin_key="ü" * 21, block=0))
    counts = [each["num_refused"] for each in logs if each["event"] == "admin_key_refused"]
    assert counts == [1, 30]
    assert link.asked == []


async def test_the_stores_answers_are_merged() -> None:
    stores = [store(index, closing)[0] for index in range(2)]
    async with (
        running_face(FakeBackend(), admin_key=KEY, stores=stores) as face,
        raw_client(face.endpoint) as client,
    ):
        await client.hello()
        assert await client.ask(Audit(id=7, admin_key=KEY)) == protocol.Audited(
            id=7,
            closes=True,
            stores=[
                StoreAudit(store=index, endpoint="tcp://store", num_blocks=4, blocks={"free": 4})
                for index in range(2)
            ],
        )


async def test_a_store_that_does_not_answer_or_differs_is_named() -> None:
    first, _ = store(0, closing)
    silent, _ = store(1, lambda _: ConnectionLostError("no answer in time"))
    down, _ = store(2, closing)
    down.is_up = False
    differs, _ = store(3, lambda _: Audited(audit=StoreAudit(discrepancies=["one more"])))
    async with (
        running_face(FakeBackend(), admin_key=KEY, stores=[first, silent, down, differs]) as face,
        raw_client(face.endpoint) as client,
    ):
        await client.hello()
        answer = await client.ask(Audit(id=1, admin_key=KEY))
        assert isinstance(answer, protocol.Audited)
        assert not answer.closes
        assert [each.closes for each in answer.stores] == [True, False, False, False]
        problems = [each.problem for each in answer.stores]
        assert problems == ["", "no answer in time", "it cannot be reached", ""]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("0123", ["0123"]),
        ("chatcmpl-0123", ["chatcmpl-0123", "0123"]),
        ("cmpl-0123", ["cmpl-0123", "0123"]),
    ],
)
async def test_a_request_goes_by_any_id_that_its_client_saw(name: str, names: list[str]) -> None:
    made, link = store(0, closing)
    async with (
        running_face(FakeBackend(), admin_key=KEY, stores=[made]) as face,
        raw_client(face.endpoint) as client,
    ):
        await client.hello()
        answer = await client.ask(Why(id=1, admin_key=KEY, name=name))
        assert isinstance(answer, protocol.Told)
        assert len(answer.stores[0].events) == 1
        (asked,) = link.asked
        assert isinstance(asked, AskWhy)
        assert asked.names == names


async def test_why_must_say_clearly_what_is_meant() -> None:
    stores = [store(index, closing)[0] for index in range(2)]
    async with (
        running_face(FakeBackend(), admin_key=KEY, stores=stores) as face,
        raw_client(face.endpoint) as client,
    ):
        await client.hello()
        for fields, field in (
            ({}, "block"),
            ({"block": 1, "name": "x"}, "block"),
            ({"block": 1}, "store"),
            ({"block": 1, "store": 2}, "store"),
            ({"name": "x", "store": -1}, "store"),
        ):
            error = await refused(client, Why(id=1, admin_key=KEY, **cast(Any, fields)))
            assert (error.code, error.field) == ("invalid_request", field)
        answer = await client.ask(Why(id=1, admin_key=KEY, block=1, store=1))
        assert isinstance(answer, protocol.Told)
        assert [each.store for each in answer.stores] == [1]


async def test_a_question_can_be_cancelled_and_needs_a_hello() -> None:
    made, link = store(0, lambda _: None)
    async with (
        running_face(FakeBackend(), admin_key=KEY, stores=[made]) as face,
        raw_client(face.endpoint) as client,
    ):
        error = await refused(client, Audit(id=4, admin_key=KEY))
        assert (error.id, error.code) == (4, "hello_required")
        await client.hello()
        client.send(Audit(id=4, admin_key=KEY))
        assert isinstance(await client.ask(Ping()), Pong)
        error = await refused(client, Cancel(id=4))
        assert (error.id, error.code) == (4, "cancelled")
        await link.cancelled.wait()


# ---- the command line ---------------------------------------------------------------------------


async def command(key_file: Path, endpoint: str, *arguments: str) -> int:
    flags = ["--gateway", endpoint, "--admin-key-file", str(key_file), "--keys", ""]
    return await asyncio.to_thread(main, [*arguments, *flags])


async def test_the_command_shows_the_answer_and_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    made, _ = store(0, closing)
    differs, _ = store(0, lambda _: Audited(audit=StoreAudit(discrepancies=["one more"])))
    async with running_face(FakeBackend(), admin_key=KEY, stores=[made]) as face:
        assert await command(key_file, face.endpoint, "audit") == 0
        assert capsys.readouterr().out.endswith("The audit closes.\n")
        assert await command(key_file, face.endpoint, "audit", "--json") == 0
        assert json.loads(capsys.readouterr().out)["stores"][0]["blocks"] == {"free": 4}
        assert await command(key_file, face.endpoint, "why", "2") == 0
        assert "blocks leased" in capsys.readouterr().out
        assert await command(key_file, face.endpoint, "why", "5:2") == 2
        assert capsys.readouterr().err == "kvbaton why: store must be below 1, got 5\n"
    async with running_face(FakeBackend(), admin_key=KEY, stores=[differs]) as face:
        assert await command(key_file, face.endpoint, "audit") == 1
        assert "discrepancy: one more\nThe audit does not close: 1" in capsys.readouterr().out


async def test_the_command_says_why_it_cannot_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVBATON_ADMIN_KEY_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert await asyncio.to_thread(main, ["audit"]) == 2
    assert "no admin key: .run/admin-key cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("KVBATON_ADMIN_KEY_FILE", str(tmp_path / "key"))
    (tmp_path / "key").write_text("another key than theirs")
    async with running_face(FakeBackend(), admin_key=KEY) as face:
        assert await asyncio.to_thread(main, ["audit", "--gateway", face.endpoint]) == 2
        said = capsys.readouterr().err
        assert "this is not the gateway's admin key" in said
        assert str(tmp_path / "key") in said
    assert await asyncio.to_thread(main, ["audit", "--gateway", "no endpoint"]) == 2
    assert "is there a gateway? --gateway names another" in capsys.readouterr().err
