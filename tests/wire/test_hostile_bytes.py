"""Bytes from strangers: a decoder gives a message or raises ProtocolError, in bounded memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.codec import MAX_MAP_ITEMS, Decoder
from kvbaton.errors import ProtocolError
from kvbaton.protocol import (
    MAX_REQUEST_BYTES,
    Cancel,
    client_message_decoder,
    gateway_message_decoder,
)
from tests.wire.golden import CLIENT_MESSAGES, GATEWAY_MESSAGES, golden_bytes

DECODERS: list[Decoder[Any]] = [client_message_decoder(), gateway_message_decoder()]
GOLDEN = [golden_bytes(name) for name in (*CLIENT_MESSAGES, *GATEWAY_MESSAGES)]
MEGABYTE = 1024 * 1024


def decode_all(raw: bytes) -> None:
    for decoder in DECODERS:
        try:
            decoder.decode(raw)
        except ProtocolError as error:
            assert error.message  # noqa: PT017 - anything else that is raised fails the test


def refusal(raw: bytes, decoder: Decoder[Any] = DECODERS[0]) -> str:
    with pytest.raises(ProtocolError) as caught:
        decoder.decode(raw)
    return caught.value.message


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_protocol_errors(raw: bytes) -> None:
    decode_all(raw)


@given(st.sampled_from(GOLDEN), st.data())
def test_mutated_messages_raise_nothing_but_protocol_errors(
    raw: bytes, data: st.DataObject
) -> None:
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where] = data.draw(st.integers(0, 255))
    decode_all(bytes(changed[: data.draw(st.integers(0, len(changed)))]))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.sampled_from([msgpack.unpackb(raw) for raw in GOLDEN]),
    st.dictionaries(
        st.sampled_from(["type", "id", "text", "token_ids", "sampling", "stop"]), VALUES
    ),
)
def test_values_of_the_wrong_type_raise_nothing_but_protocol_errors(
    fields: dict[str, Any], wrong: dict[str, Any]
) -> None:
    decode_all(msgpack.packb({**fields, **wrong}))


@pytest.mark.parametrize("raw", GOLDEN)
def test_every_cut_of_a_message_is_refused(raw: bytes) -> None:
    for length in range(len(raw)):
        refusal(raw[:length])
    refusal(raw + b"\0")


def test_a_message_over_the_limit_is_refused_unread() -> None:
    raw = bytes(MAX_REQUEST_BYTES + 1)
    assert refusal(raw) == f"message of {len(raw)} bytes exceeds the limit of {MAX_REQUEST_BYTES}"


@pytest.mark.parametrize(
    "opening",
    [
        b"\xdd\xff\xff\xff\xff",  # array
        b"\xdf\xff\xff\xff\xff",  # map
        b"\xdb\xff\xff\xff\xff",  # string
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # extension
        b"\xdd\x00\x0f\xff\xff",  # an array that the message would hold but for its end
        b"\xdd\x00\x0f\xff\xff" * 500,
        b"\x81\xa1x\xdd\x00\x0f\xff\xff" * 400,
    ],
)
def test_declared_sizes_cost_bounded_memory(opening: bytes) -> None:
    raw = opening.ljust(MEGABYTE, b"\0")
    tracemalloc.start()
    try:
        refusal(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 160 * MEGABYTE  # gigabytes if msgpack believed them, 500 times 8 MB


def test_a_message_of_empty_containers_costs_a_bounded_multiple_of_its_size() -> None:
    count = MEGABYTE // 8
    raw = b"\x82\xa4type\xa4ping\xa1x\xdd" + count.to_bytes(4, "big") + b"\x80" * count
    tracemalloc.start()
    try:
        decode_all(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * len(raw)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"\x81\xa4type"])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    for depth in (10, 1_000, 100_000):
        refusal(opening * depth)
        refusal(opening * depth + b"\xc0")


def test_extension_types_and_timestamps_are_refused() -> None:
    for extension in (msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2)):
        refusal(msgpack.packb({"type": "ping", "x": extension}))
    assert refusal(b"\x82\xa4type\xa4ping\xa1x\xc7\x00\x05").startswith("extension type 5")
    refusal(b"\x82\xa4type\xa4ping\xa1x\xc7\x00\xff")


@pytest.mark.parametrize("key", [1, 1.5, None, True])
def test_keys_that_are_no_strings_are_refused(key: object) -> None:
    refusal(msgpack.packb({key: 1}))
    refusal(msgpack.packb({"type": "ping", "x": {key: 1}}))


def test_of_duplicate_keys_the_last_counts() -> None:
    raw = b"\x83\xa4type\xa6cancel\xa2id\x01\xa2id\x02"
    assert DECODERS[0].decode(raw) == Cancel(id=2)


def test_too_many_keys_are_refused() -> None:
    fields = {f"k{index}": 0 for index in range(MAX_MAP_ITEMS)}
    assert "map" in refusal(msgpack.packb({"type": "ping", **fields}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x81\xa4type\xa4ping\x00",  # something after the message
        b"\xc1",  # the one byte that MessagePack does not use
        b"\x81\xa4type\xa4\xff\xfe\xfd\xfc",  # not UTF-8
        b"\x82\xa4type\xa8generate\xa2id\xa11",  # a number as text
        b"\x82\xa4type\xa8generate\xa2id\xc3",  # a truth value for a number
        b"\x82\xa4type\xa8generate\xa2id\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00",  # 1.5
        b"\x81\xc4\x04type\xa4ping",  # bytes for a key
        b"\x81\xa4type\xc4\x04ping",  # bytes for a string
        b"\x81\xa4type\x01",
        b"\x81\xa4type\xa7unknown",
        b"\x80",
        b"\x90",
        b"\xa4ping",
    ],
)
def test_what_only_looks_like_a_message_is_refused(raw: bytes) -> None:
    refusal(raw)


def test_surrogates_are_not_utf_8() -> None:
    refusal(b"\x83\xa4type\xa8generate\xa2id\x01\xa4text\xa3\xed\xa0\x80")


@settings(max_examples=30)
@given(st.integers(2**64, 2**70))
def test_integers_beyond_64_bits_cannot_be_written(number: int) -> None:
    with pytest.raises(OverflowError):
        msgpack.packb(number)
