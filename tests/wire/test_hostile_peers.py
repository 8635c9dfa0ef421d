"""Hostile bytes to a running face: it answers in words, and serves everybody else as before."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.protocol import MAX_REQUEST_BYTES, Error, Generate, Ping, Pong
from tests.net.gateways import RawClient, raw_client, running_face
from tests.unit.gateway_fakes import FakeBackend, says
from tests.wire.golden import CLIENT_MESSAGES, GATEWAY_MESSAGES, golden_bytes

GOLDEN = [golden_bytes(name) for name in (*CLIENT_MESSAGES, *GATEWAY_MESSAGES)]
ARRAY_OF_MILLIONS = b"\xdd\x00\x3f\xff\xff"


async def canary(endpoint: str) -> None:
    """A request that must be served."""
    async with raw_client(endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        tokens, _ = await client.answers()
        assert "".join(token.text for token in tokens) == "tweet"


async def attack(messages: list[list[bytes]], *, after_hello: bool) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with (
        running_face(FakeBackend(lambda _: says("tweet"))) as face,
        raw_client(face.endpoint) as attacker,
    ):
        if after_hello:
            await attacker.hello()
        for frames in messages:
            attacker.send_frames(frames)
        attacker.send(Ping())
        while not is_answer_to_ping(await attacker.receive()):
            pass
        await canary(face.endpoint)
    assert failures == []


def is_answer_to_ping(message: object) -> bool:
    is_refused = isinstance(message, Error) and message.code == "hello_required"
    return isinstance(message, Pong) or is_refused


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from(GOLDEN)))
    raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.binary(max_size=40) | mutated(), min_size=1, max_size=3), min_size=1, max_size=8
    ),
    st.booleans(),
)
def test_no_bytes_stop_the_face(messages: list[list[bytes]], after_hello: bool) -> None:
    asyncio.run(attack(messages, after_hello=after_hello))


@pytest.mark.parametrize("after_hello", [False, True])
async def test_huge_and_many_framed_messages_are_refused(after_hello: bool) -> None:
    await attack(
        [
            [bytes(MAX_REQUEST_BYTES + 1)],
            [ARRAY_OF_MILLIONS.ljust(MAX_REQUEST_BYTES, b"\0")],
            [(ARRAY_OF_MILLIONS * 1000).ljust(MAX_REQUEST_BYTES, b"\0")],
            [b"\x91" * MAX_REQUEST_BYTES],
            [b""] * 10_000,
            [b"", golden_bytes("ping")],
        ],
        after_hello=after_hello,
    )


WRONG_FIELDS: list[dict[str, Any]] = [
    {"text": 5},
    {"token_ids": "abc"},
    {"token_ids": [1.5]},
    {"token_ids": [None]},
    {"messages": [{"content": "x"}]},
    {"messages": {"role": "user", "content": "x"}},
    {"text": "x", "sampling": {"temperature": "hot"}},
    {"text": "x", "sampling": [1]},
    {"text": "x", "stop": "not a list"},
    {"text": "x", "deadline_ms": 1.5},
]


async def asked(client: RawClient, fields: dict[str, Any]) -> Error:
    client.send_frames([msgpack.packb({"type": "generate", **fields})])
    answer = await client.receive()
    assert isinstance(answer, Error)
    return answer


@pytest.mark.parametrize("fields", WRONG_FIELDS)
async def test_a_request_of_the_wrong_shape_is_refused_by_its_id(fields: dict[str, Any]) -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        await client.hello()
        error = await asked(client, {"id": 7, **fields})
        assert (error.id, error.code) == (7, "protocol_error")
        assert "Expected" in error.message or "required field" in error.message
        assert isinstance(await client.ask(Ping()), Pong)


async def test_a_refusal_never_ends_a_request_in_flight() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=7, text="x"))
        await backend.submitted()
        assert (await asked(client, {"id": 7, "text": 5})).id is None
        assert (await asked(client, {"id": "7", "text": 5})).id is None
        backend.streams[0].feed(says("done"))
        tokens, _ = await client.answers()
        assert "".join(token.text for token in tokens) == "done"


async def test_a_gateway_message_from_a_client_is_refused() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        await client.hello()
        for name in GATEWAY_MESSAGES:
            client.send_frames([golden_bytes(name)])
            error = await client.receive()
            assert isinstance(error, Error)
            assert error.code == "protocol_error"
