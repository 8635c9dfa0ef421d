"""The codec by value: what encode gives, decode takes; what is no message is refused in words."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.codec import Decoder, encode
from kvbaton.errors import ProtocolError
from kvbaton.protocol import (
    Error,
    Generate,
    Token,
    Tokens,
    client_message_decoder,
    gateway_message_decoder,
)
from kvbaton.sampling import SamplingParams

INT64 = st.integers(-(2**63), 2**64 - 1)
TEXT = st.text(max_size=20)  # never has surrogates, as UTF-8 has none
FINITE = st.floats(allow_nan=False)


class Blob(msgspec.Struct, tag_field="type", tag="blob"):
    """A message with bytes; the client protocol has none."""

    data: bytes


@given(
    st.builds(
        Generate,
        id=INT64,
        text=st.none() | TEXT,
        token_ids=st.none() | st.lists(INT64, max_size=5),
        model=st.none() | TEXT,
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.none() | INT64,
            temperature=FINITE,
            seed=st.none() | INT64,
            stop_token_ids=st.lists(INT64, max_size=3),
            ignore_eos=st.booleans(),
        ),
        stop=st.lists(TEXT, max_size=3),
        deadline_ms=st.none() | INT64,
    )
)
def test_a_request_survives_the_wire(message: Generate) -> None:
    assert client_message_decoder().decode(encode(message)) == message


TOKEN = st.builds(
    Token,
    index=INT64,
    token_id=INT64,
    text=TEXT,
    logprob=st.none() | FINITE,
    top_logprobs=st.lists(st.tuples(INT64, FINITE), max_size=3),
)


@given(st.builds(Tokens, id=INT64, tokens=st.lists(TOKEN, max_size=3)))
def test_tokens_survive_the_wire(message: Tokens) -> None:
    assert gateway_message_decoder().decode(encode(message)) == message


@given(st.builds(Error, code=TEXT, message=TEXT, id=st.none() | INT64, field=st.none() | TEXT))
def test_an_error_survives_the_wire(message: Error) -> None:
    assert gateway_message_decoder().decode(memoryview(encode(message))) == message


@given(st.binary(max_size=64))
def test_bytes_travel_as_bytes(data: bytes) -> None:
    raw = encode(Blob(data))
    assert msgpack.unpackb(raw) == {"type": "blob", "data": data}
    assert Decoder[Blob](Blob).decode(raw) == Blob(data)


def test_a_message_as_large_as_the_limit_is_read_and_one_byte_more_is_not() -> None:
    raw = encode(Blob(bytes(100)))
    assert Decoder[Blob](Blob, len(raw)).decode(raw) == Blob(bytes(100))
    with pytest.raises(ProtocolError, match=f"{len(raw)} bytes exceeds the limit of"):
        Decoder[Blob](Blob, len(raw) - 1).decode(raw)


def test_a_refusal_says_what_was_expected_and_where() -> None:
    raw = msgpack.packb({"type": "generate", "id": 1, "sampling": {"top_k": "many"}})
    with pytest.raises(ProtocolError, match=r"Expected `int`, got `str` - at `\$.sampling.top_k`"):
        client_message_decoder().decode(raw)
    with pytest.raises(ProtocolError, match="missing required field `id`"):
        client_message_decoder().decode(msgpack.packb({"type": "generate"}))
