"""Each message type from each role at each kind of server: handled, or refused beforehand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest

from common.messages import (
    INTERNAL_VERSION,
    Failed,
    FromStore,
    FromWorker,
    Heartbeat,
    Hello,
    Member,
    Message,
    Ok,
    Welcome,
    decoder,
)
from common.messages.rights import RIGHTS
from common.net.order import first_number
from common.net.server import Server
from common.service import Tasks, live_seams
from kvbaton import operations, protocol, questions
from kvbaton.codec import encode
from kvbaton.errors import KvbatonError
from services.gateway.access.admin import Admin
from services.gateway.clients.face import ClientFace
from tests.security.samples import UNIONS, kinds, sample
from tests.security.targets import DECODERS, Wire
from tests.unit.gateway_fakes import FakeBackend, FakeRng, demo_model, says

# What the table must say, in other words than its own: a change of rights is a change of this too.
_MEMBER = "hello heartbeat leave stopped"
_WORKER = "fill commit seal quit discard holdings claim release suspend yield lease give_back"
_ANYBODY = "hello ping cancel models"
_CLIENT = f"{_ANYBODY} generate score tokenize detokenize"
_ADMIN = f"{_ANYBODY} audit why stats status drain log_level"
EXPECTED = {
    "kvstore": {
        "gateway": f"{_MEMBER} open abort ask_audit ask_why ask_status drop_cache log_level",
        "prefill": f"{_MEMBER} {_WORKER}",
        "decode": f"{_MEMBER} {_WORKER}",
    },
    "kvstore data": {
        "prefill": "hello heartbeat put get offer",
        "decode": "hello heartbeat put get offer",
    },
    "prefill": {"gateway": "hello heartbeat prefill reserve drain log_level"},
    "decode": {"gateway": "hello heartbeat reserve drain log_level"},
    "gateway": {"client": _CLIENT, "admin": _ADMIN, "": f"{_CLIENT} {_ADMIN}"},
}
UNION_OF = {
    "kvstore": "to_store",
    "kvstore data": "to_store",
    "prefill": "to_worker",
    "decode": "to_worker",
    "gateway": "client",
}
USERS = ("gateway", "kvstore", "prefill", "decode", "admin", "client/acme/bob")
PEER, HONEST = b"peer", b"honest"
ADMIN_KEY = "a key of 16 chars"


def test_the_table_says_what_is_expected_and_names_every_message() -> None:
    tags = {
        server: {
            role: {kind.__struct_config__.tag for kind in rights} for role, rights in table.items()
        }
        for server, table in RIGHTS.items()
    }
    assert tags == {
        server: {role: set(names.split()) for role, names in table.items()}
        for server, table in EXPECTED.items()
    }
    for union in ("to_store", "to_worker", "client"):
        tables = [tags[server] for server, spoken in UNION_OF.items() if spoken == union]
        granted = set().union(*(names for table in tables for names in table.values()))
        assert granted == {kind.tag for kind in kinds(UNIONS[union])}


def messages(union: str) -> Iterator[Any]:
    """One of each type that the union's decoder takes."""
    for kind in kinds(UNIONS[union]):
        for seed in itertools.count():
            fields = sample(kind, Random(seed)) | {"call_id": 7}
            try:
                yield DECODERS[union].decode(msgspec.msgpack.encode(fields))
                break
            except KvbatonError:
                assert seed < 1000, kind


class Guarded:
    """A server of internal messages with the rights of its kind, over a wire without sockets."""

    def __init__(self, kind: str) -> None:
        self.wire = Wire()
        self.handled: list[Message] = []
        self._next_numbers = {PEER: 1, HONEST: 1}
        union = UNIONS[UNION_OF[kind]]
        self._decoder = decoder(FromStore | FromWorker)
        self.server = Server(
            self.wire,
            "memory",
            decoder(union),
            rights=RIGHTS[kind],
            accept=lambda _peer, _hello: Welcome(instance_id="0" * 32),
            handle=self._handle,
            gone=lambda _peer, _member: None,
        )

    def _handle(self, _peer: bytes, message: Message, _bulk: Sequence[memoryview]) -> Message:
        self.handled.append(message)
        return Ok()

    def say(self, message: Message, user: str, peer: bytes = PEER) -> str:
        """What comes of it: the name of the answer, or the code of a refusal."""
        number = self._next_numbers[peer]
        self._next_numbers[peer] += 1
        numbered = msgspec.structs.replace(message, call_id=7, number=number)
        self.wire.deliver(peer, [encode(numbered)], user)
        (raw,) = self.wire.take(peer)
        answer = self._decoder.decode(raw)
        return answer.code if isinstance(answer, Failed) else type(answer).__name__

    def hello(self, role: str, user: str, peer: bytes = PEER) -> str:
        self._next_numbers[peer] = first_number(self._next_numbers[peer])
        member = Member(member_id="0" * 32, role=role, name="x", host_id="h", pid=1)
        return self.say(Hello(internal_version=INTERNAL_VERSION, member=member), user, peer)


@pytest.mark.parametrize("kind", [kind for kind in RIGHTS if kind != "gateway"])
@pytest.mark.parametrize("uses_keys", [True, False])
async def test_each_message_of_each_role_is_handled_or_refused(kind: str, uses_keys: bool) -> None:
    num_handled = num_refused = 0
    for role in ("gateway", "prefill", "decode"):
        for message in messages(UNION_OF[kind]):
            if isinstance(message, Hello):
                continue  # below
            guarded = Guarded(kind)
            user = role if uses_keys else ""
            is_welcome = guarded.hello(role, user) == "Welcome"
            assert is_welcome is (role in RIGHTS[kind])
            tag = type(message).__struct_config__.tag
            answer = guarded.say(message, user)
            if tag in EXPECTED[kind].get(role, "").split():
                assert (answer, len(guarded.handled)) == ("Ok", 1), tag
                num_handled += 1
            else:
                expected = "forbidden" if is_welcome or uses_keys else "hello_required"
                assert (answer, guarded.handled) == (expected, []), tag
                assert guarded.server.refusals.num > 0
                num_refused += 1
    assert num_handled
    assert num_refused


@pytest.mark.parametrize("kind", [kind for kind in RIGHTS if kind != "gateway"])
async def test_who_says_hello_speaks_for_its_own_role_and_has_business_there(kind: str) -> None:
    for user, claimed in itertools.product(USERS, ("gateway", "prefill", "decode")):
        guarded = Guarded(kind)
        answer = guarded.hello(claimed, user)
        may = user == claimed and user in EXPECTED[kind]
        assert answer == ("Welcome" if may else "forbidden"), (user, claimed)
        assert bool(guarded.server.peers) is may


async def test_a_routing_id_lends_nobody_the_rights_of_who_had_it() -> None:
    guarded = Guarded("kvstore")
    assert guarded.hello("decode", "decode") == "Welcome"
    for user in ("prefill", "gateway", "client/acme/bob"):
        assert guarded.say(Heartbeat(), user) == "forbidden"
    assert guarded.handled == []
    assert guarded.say(Heartbeat(), "decode") == "Ok"


async def test_a_violation_disturbs_nobody() -> None:
    guarded = Guarded("kvstore")
    assert guarded.hello("decode", "decode", HONEST) == "Welcome"
    for message in messages("to_store"):
        guarded.say(message, "client/acme/bob")
        assert guarded.say(Heartbeat(), "decode", HONEST) == "Ok"
    assert guarded.server.refusals.num == len(kinds(UNIONS["to_store"]))


# ---- clients ------------------------------------------------------------------------------------


class Face:
    """The gateway's face for clients, over a wire without sockets."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.backend = FakeBackend(lambda _request: says("tweet"))
        self._failures: list[BaseException] = []
        self._tasks = Tasks(self._failures.append)
        self._seams = live_seams(self.wire)
        self._face = ClientFace(
            replace(self._seams, rng=FakeRng()),
            "memory",
            self.backend,
            demo_model(),
            Admin(ADMIN_KEY, (), self._seams.clock),
            tasks=self._tasks,
            instance_id="0" * 32,
        )

    async def say(self, message: protocol.ClientMessage, user: str, peer: bytes = PEER) -> str:
        """What comes of it at last: the name of the answer, the code of a refusal."""
        self.wire.deliver(peer, [encode(message)], user)
        answers = [""]
        while answers[-1] in ("", "Accepted", "Prompt", "Tokens"):
            await asyncio.sleep(0)
            for raw in self.wire.take(peer):
                answer = DECODERS["gateway"].decode(raw)
                is_error = isinstance(answer, protocol.Error)
                answers.append(answer.code if is_error else type(answer).__name__)
        return answers[-1]

    async def hello(self, user: str, peer: bytes = PEER) -> str:
        hello = protocol.Hello(protocol_version=protocol.PROTOCOL_VERSION)
        return await self.say(hello, user, peer)

    async def __aenter__(self) -> Face:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._face.close()
        await self._tasks.close()
        self._seams.files.close()
        assert self._failures == []


GENERATE = protocol.Generate(id=1, text="x")
SCORE = questions.Score(id=1, token_ids=[[5]])
TOKENIZE = questions.Tokenize(id=1, text="x")
DETOKENIZE = questions.Detokenize(id=1, token_ids=[5])
AUDIT = protocol.Audit(id=1, admin_key=ADMIN_KEY)
WHY = protocol.Why(id=1, admin_key=ADMIN_KEY, name="x")
OPERATIONS = (
    operations.Status(id=1, admin_key=ADMIN_KEY),
    operations.Drain(id=1, admin_key=ADMIN_KEY, member="decode.1"),
    operations.SetLogLevel(id=1, admin_key=ADMIN_KEY, member="decode.1", level="debug"),
)


@pytest.mark.parametrize(
    ("user", "answers"),
    [
        ("client/acme/bob", ["Welcome", "Done", "forbidden", "forbidden", "Pong"]),
        ("admin", ["Welcome", "forbidden", "Audited", "Told", "Pong"]),
        ("", ["Welcome", "Done", "Audited", "Told", "Pong"]),
        *((role, ["forbidden"] * 5) for role in ("gateway", "kvstore", "prefill", "decode")),
    ],
)
async def test_clients_generate_and_operators_ask(user: str, answers: list[str]) -> None:
    async with Face() as face:
        heard = [await face.hello(user)]
        heard += [await face.say(each, user) for each in (GENERATE, AUDIT, WHY, protocol.Ping())]
        assert heard == answers
        assert len(face.backend.requests) == answers.count("Done")


@pytest.mark.parametrize(
    ("user", "answers"),
    [
        (
            "client/acme/bob",
            ["Scored", "Tokenized", "Detokenized", "ModelList", "forbidden"],
        ),
        ("admin", ["forbidden", "forbidden", "forbidden", "ModelList", "Counted"]),
        ("", ["Scored", "Tokenized", "Detokenized", "ModelList", "Counted"]),
        *((role, ["forbidden"] * 5) for role in ("gateway", "kvstore", "prefill", "decode")),
    ],
)
async def test_questions_take_the_right_to_them(user: str, answers: list[str]) -> None:
    async with Face() as face:
        await face.hello(user)
        asked = (SCORE, TOKENIZE, DETOKENIZE, questions.Models(id=1), questions.Stats(id=1))
        assert [await face.say(each, user) for each in asked] == answers
        assert [request.tenant for request in face.backend.requests] == (
            ["acme"] if user.startswith("client") else [""] if not user else []
        )


@pytest.mark.parametrize(
    ("user", "answers"),
    [
        ("client/acme/bob", ["forbidden"] * 3),
        ("admin", ["Standing", "not_found", "not_found"]),
        ("", ["Standing", "not_found", "not_found"]),
        *((role, ["forbidden"] * 3) for role in ("gateway", "kvstore", "prefill", "decode")),
    ],
)
async def test_commands_take_an_operators_right(user: str, answers: list[str]) -> None:
    async with Face() as face:
        await face.hello(user)
        assert [await face.say(each, user) for each in OPERATIONS] == answers


async def test_questions_too_come_after_hello() -> None:
    async with Face() as face:
        for message in (SCORE, TOKENIZE, DETOKENIZE, questions.Models(id=1)):
            assert await face.say(message, "client/acme/bob") == "hello_required"
        assert face.backend.requests == []


async def test_an_operators_key_file_alone_does_not_open_the_books() -> None:
    async with Face() as face:
        await face.hello("admin")
        assert await face.say(protocol.Audit(id=1, admin_key="a wrong key"), "admin") == "forbidden"
        for message in OPERATIONS:
            wrong = msgspec.structs.replace(message, admin_key="a wrong key")
            assert await face.say(wrong, "admin") == "forbidden"


async def test_a_request_counts_for_the_tenant_of_its_key() -> None:
    async with Face() as face:
        for user in ("client/acme/bob", "client//default", ""):
            await face.hello(user)
            assert await face.say(GENERATE, user) == "Done"
        assert [request.tenant for request in face.backend.requests] == ["acme", "", ""]


async def test_a_routing_id_lends_no_client_the_requests_of_who_had_it() -> None:
    async with Face() as face:
        await face.hello("client/acme/bob")
        assert await face.say(GENERATE, "client/evil/eve") == "hello_required"
        assert await face.say(GENERATE, "client/acme/bob") == "hello_required", "it is forgotten"
        assert face.backend.requests == []
