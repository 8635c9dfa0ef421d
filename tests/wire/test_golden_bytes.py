"""The bytes on the wire do not change: every message, in both directions."""

from __future__ import annotations

import msgpack
import pytest

from kvbaton.codec import encode
from kvbaton.errors import ProtocolError
from kvbaton.protocol import (
    Done,
    Error,
    Generate,
    Ping,
    Tokens,
    client_message_decoder,
    gateway_message_decoder,
)
from kvbaton.sampling import SamplingParams
from tests.wire.golden import CLIENT_MESSAGES, FOLDER, GATEWAY_MESSAGES, golden_bytes


@pytest.mark.parametrize("name", CLIENT_MESSAGES)
def test_a_client_message_has_its_golden_bytes(name: str) -> None:
    assert encode(CLIENT_MESSAGES[name]) == golden_bytes(name)
    assert client_message_decoder().decode(golden_bytes(name)) == CLIENT_MESSAGES[name]


@pytest.mark.parametrize("name", GATEWAY_MESSAGES)
def test_a_gateway_message_has_its_golden_bytes(name: str) -> None:
    assert encode(GATEWAY_MESSAGES[name]) == golden_bytes(name)
    assert gateway_message_decoder().decode(golden_bytes(name)) == GATEWAY_MESSAGES[name]


def test_every_golden_file_is_held_by_a_message() -> None:
    assert {path.stem for path in FOLDER.glob("*.hex")} == {*CLIENT_MESSAGES, *GATEWAY_MESSAGES}


def test_every_kind_of_message_has_golden_bytes() -> None:
    tags = [type(message).__struct_config__.tag for message in CLIENT_MESSAGES.values()]
    assert set(tags) == {
        *("hello", "generate", "cancel", "ping", "audit", "why", "status", "drain", "log_level"),
        *("score", "tokenize", "detokenize", "models", "stats"),
    }
    tags = [type(message).__struct_config__.tag for message in GATEWAY_MESSAGES.values()]
    assert set(tags) == {
        *("welcome", "accepted", "prompt", "tokens", "done", "error", "pong", "audited", "told"),
        *("scored", "tokenized", "detokenized", "model_list", "counted"),
        *("standing", "drained", "log_level_set"),
    }


def test_keys_may_come_in_any_order_and_numbers_in_any_width() -> None:
    raw = b"\x83\xa4text\xa1x\xa2id\xcf\x00\x00\x00\x00\x00\x00\x00\x07\xa4type\xa8generate"
    assert client_message_decoder().decode(raw) == Generate(id=7, text="x")


def test_a_whole_number_is_good_for_a_float_and_nil_for_what_is_not_given() -> None:
    fields = {"type": "generate", "id": 1, "text": "x", "token_ids": None}
    raw = msgpack.packb({**fields, "sampling": {"temperature": 1, "max_tokens": None}})
    message = client_message_decoder().decode(raw)
    assert isinstance(message, Generate)
    assert message.sampling.temperature == 1.0
    assert isinstance(message.sampling.temperature, float)


def test_unknown_keys_are_ignored_at_every_level() -> None:
    raw = msgpack.packb(
        {"type": "tokens", "id": 1, "new": {}, "tokens": [{"index": 0, "token_id": 5, "new": 1}]}
    )
    message = gateway_message_decoder().decode(raw)
    assert isinstance(message, Tokens)
    assert message.tokens[0].token_id == 5
    assert client_message_decoder().decode(msgpack.packb({"type": "ping", "new": [1]})) == Ping()


def test_only_what_differs_from_its_default_is_sent() -> None:
    assert msgpack.unpackb(encode(Generate(id=1, text="x"))) == {
        "type": "generate",
        "id": 1,
        "text": "x",
    }
    assert msgpack.unpackb(encode(Error(code="c", message="m"))) == {
        "type": "error",
        "code": "c",
        "message": "m",
    }


def test_a_gateway_message_is_no_client_message() -> None:
    done = GATEWAY_MESSAGES["done"]
    assert isinstance(done, Done)
    with pytest.raises(Exception, match="Invalid value 'done'"):
        client_message_decoder().decode(encode(done))


def test_numbers_as_keys_are_written_as_strings() -> None:
    message = Generate(id=1, text="x", sampling=SamplingParams(logit_bias={5: 1.0}))
    assert msgpack.unpackb(encode(message))["sampling"] == {"logit_bias": {"5": 1.0}}
    assert client_message_decoder().decode(encode(message)) == message
    fields = {"type": "generate", "id": 1, "text": "x", "sampling": {"logit_bias": {"x": 1}}}
    with pytest.raises(ProtocolError, match="Expected `int`"):
        client_message_decoder().decode(msgpack.packb(fields))
