"""Who gets in where keys are used, on real sockets: known keys, each as its user, nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import structlog
import zmq
from zmq.utils import z85

from common.config import StartError
from common.metrics import exposition
from common.net import zap
from common.net.access import (
    PUBLIC_FILE,
    SERVICES,
    Access,
    read_public_keys,
    role_of,
    tenant_of,
)
from common.net.zmq_transport import ZmqTransport
from common.service import EXIT_MISCONFIGURED, Seams, Service, serve
from kvbaton.keys import client_curve
from kvbaton.sockets import Curve, EventSocket
from scripts.cluster.keys import add_client, make_keys
from tests.security.curves import (
    PATIENCE_S,
    SAID,
    keys_of,
    outcome,
    stranger,
    with_keys,
    without_keys,
)

ANY_PORT = "tcp://127.0.0.1:*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "keys"
    assert make_keys(folder)
    add_client(folder, "bob", "acme")
    return folder


class Heard:
    """A router of a role's, and what it hears: user and message."""

    def __init__(self, transport: ZmqTransport) -> None:
        self.messages: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.router = transport.router(ANY_PORT, self._on_frames)

    def _on_frames(self, _peer: bytes, frames: list[memoryview], user: str) -> None:
        self.messages.put_nowait((user, bytes(frames[-1])))

    async def next(self) -> tuple[str, bytes]:
        return await asyncio.wait_for(self.messages.get(), PATIENCE_S)


@asynccontextmanager
async def listening(folder: Path, role: str) -> AsyncIterator[Heard]:
    transport = ZmqTransport(keys_of(folder, role))
    heard = Heard(transport)
    try:
        yield heard
    finally:
        heard.router.close()
        transport.close()


@pytest.mark.parametrize("role", SERVICES)
async def test_each_key_gets_in_as_its_user_wherever_keys_are_used(folder: Path, role: str) -> None:
    server_key = keys_of(folder, role).own.public_key
    curves = {each: keys_of(folder, each).connecting(role) for each in SERVICES}
    for user, file in {
        "client//default": "client.key",
        "client/acme/bob": "client-bob.key",
        "admin": "admin.key",
    }.items():
        curve = client_curve(folder / file)
        assert curve is not None
        curves[user] = Curve(curve.public_key, curve.secret_key, server_key)
    async with listening(folder, role) as heard:
        for user, curve in curves.items():
            with zmq.Context() as context:
                dealer = EventSocket(context, zmq.DEALER, lambda _frames: None, linger_ms=1000)
                with closing(dealer):
                    dealer.secure(curve)
                    dealer.connect(heard.router.endpoint)
                    dealer.send([b"1", b"2", SAID])
                    assert await heard.next() == (user, SAID)
    assert [role_of(user) for user in curves] == [*SERVICES, "client", "client", "admin"]
    assert [tenant_of(user) for user in curves] == [*[""] * 5, "acme", ""]


def with_password(dealer: EventSocket) -> None:
    dealer.raw.setsockopt(zmq.PLAIN_USERNAME, b"gateway")
    dealer.raw.setsockopt(zmq.PLAIN_PASSWORD, b"secret")


async def test_nobody_else_gets_in(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    other, gateway = keys_of(tmp_path / "other", "gateway"), keys_of(folder, "gateway")
    server_key = gateway.public.roles["kvstore"]
    its_public_key_alone = Curve(gateway.own.public_key, other.own.secret_key, server_key)
    not_understood = ("FAILED_PROTOCOL", "FAILED_NO_DETAIL", "DISCONNECTED")
    async with listening(folder, "kvstore") as heard:
        for configure, expected in (
            (with_keys(stranger(server_key)), ("FAILED_AUTH",)),
            (with_keys(replace(other.binding, server_key=server_key)), ("FAILED_AUTH",)),
            (with_keys(its_public_key_alone), not_understood),
            (with_keys(gateway.connecting("prefill")), not_understood),
            (with_password, not_understood),
            (without_keys, not_understood),
        ):
            assert await outcome(heard.router.endpoint, configure) in expected
        assert heard.messages.empty()
        curve = gateway.connecting("kvstore")
        assert await outcome(heard.router.endpoint, with_keys(curve)) == "SUCCEEDED"
        assert await heard.next() == ("gateway", SAID)


async def test_a_key_that_is_taken_out_is_refused(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    curve = client_curve(add_client(tmp_path / "keys", "bob", "acme"))
    assert curve is not None
    public = read_public_keys(tmp_path / "keys")
    for clients, expected in (
        (public.clients, "SUCCEEDED"),
        (public.clients[:1], "FAILED_AUTH"),
    ):
        kept = msgspec.structs.replace(public, clients=clients)
        (tmp_path / "keys" / PUBLIC_FILE).write_bytes(msgspec.json.encode(kept))
        async with listening(tmp_path / "keys", "gateway") as heard:
            assert await outcome(heard.router.endpoint, with_keys(curve)) == expected


async def test_a_socket_with_keys_lets_nobody_in_where_no_handler_decides(folder: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = EventSocket(context, zmq.ROUTER, lambda _frames: None, linger_ms=0)
    with context, closing(router):
        router.secure(keys_of(folder, "kvstore").binding)
        router.raw.bind(ANY_PORT)
        router.start()
        endpoint = router.raw.getsockopt_string(zmq.LAST_ENDPOINT)
        curve = keys_of(folder, "gateway").connecting("kvstore")
        assert await outcome(endpoint, with_keys(curve)) != "SUCCEEDED"


# ---- the proof at the start ---------------------------------------------------------------------


@pytest.fixture
def lets_all_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zap, "user_of", lambda _request, _users: "decode")


async def test_the_proof_holds_where_wrong_keys_are_refused(folder: Path) -> None:
    before = exposition()
    with closing(ZmqTransport(keys_of(folder, "decode"))) as transport:
        await transport.prove()
    assert exposition() == before, "it is no refusal that anybody should worry about"
    with closing(ZmqTransport()) as transport:
        await transport.prove()  # there is nothing to prove


@pytest.fixture
def logging_of_a_process() -> Iterator[None]:
    """A process sets up its logging for itself; the tests after this one have their own."""
    former = structlog.get_config()
    yield
    structlog.configure(**former)


@pytest.mark.usefixtures("lets_all_in", "logging_of_a_process")
async def test_a_process_that_lets_a_wrong_key_in_does_not_start(folder: Path) -> None:
    refused = pytest.raises(StartError, match="a wrong key was not refused: HANDSHAKE_SUCCEEDED")
    with closing(ZmqTransport(keys_of(folder, "decode"))) as transport, refused:
        await transport.prove()

    def make_service(_seams: Seams) -> Service:
        pytest.fail("it must not come to this")

    access = Access("decode", str(folder), insecure=False, binds=[])
    assert await serve("decode.1", "error", access, make_service) == EXIT_MISCONFIGURED


def request_of(
    key: bytes, *, domain: bytes = b"kvbaton", mechanism: bytes = b"CURVE"
) -> list[bytes]:
    return [b"1.0", b"id", domain, b"127.0.0.1", b"", mechanism, key]


def test_only_a_well_formed_request_about_a_known_key_has_a_user(folder: Path) -> None:
    users = read_public_keys(folder).users()
    public_key, user = next(iter(users.items()))
    key = z85.decode(public_key.encode())
    whole = request_of(key)
    assert zap.user_of(whole, users) == user
    assert zap.user_of(whole, {}) == ""
    assert zap.user_of(request_of(bytes(32)), users) == ""
    assert zap.user_of(request_of(key, domain=b"global"), users) == ""
    assert zap.user_of(request_of(key, mechanism=b"NULL"), users) == ""
    assert zap.user_of([b"2.0", *whole[1:]], users) == ""
    for length in range(len(whole)):
        assert zap.user_of(whole[:length], users) == ""
    assert zap.user_of([*whole, b"more"], users) == ""
