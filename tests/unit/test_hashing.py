"""Block keys: equal only where tenant, model, salt and every token so far are equal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kv.hashing import KEY_BYTES, block_key, prompt_keys, root_key
from common.kv.layout import KvLayout
from common.messages import OpenHandoff, ToStore, decoder
from kvbaton.codec import encode
from kvbaton.errors import ProtocolError

SECRET = b"secret"
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=12)
FEW = settings(max_examples=100, deadline=None, derandomize=True)


def test_the_keys_are_those_that_they_have_always_been() -> None:
    root = root_key(SECRET, "tenant", "fingerprint", "salt")
    assert root.hex() == "08d05f27d9f292a53371aae29d639a203c99e23e5a682bb58b6325673f7449c0"
    assert [key.hex() for key in prompt_keys(root, [1, 2, 3, 4, 5], 2)] == [
        "97d4397a30731fd36d549a5c0d4c2dc48ee4b0146fe9e1ffa6c5bcce5e9181fb",
        "a6df366f624133e7e74283376b565706e5cc38af10dcc08f77e82bd4d9d484f6",
    ]


@pytest.mark.parametrize(
    "other",
    [
        root_key(b"another", "tenant", "fingerprint", "salt"),
        root_key(SECRET, "another", "fingerprint", "salt"),
        root_key(SECRET, "tenant", "another", "salt"),
        root_key(SECRET, "tenant", "fingerprint", "another"),
        root_key(SECRET, "tenant", "fingerprint"),
        root_key(SECRET, "tenantf", "ingerprint", "salt"),  # shifted from field to field
        root_key(SECRET, "", "tenantfingerprint", "salt"),
    ],
)
def test_each_part_of_a_root_changes_every_key(other: bytes) -> None:
    root = root_key(SECRET, "tenant", "fingerprint", "salt")
    keys, others = prompt_keys(root, [1, 2, 3, 4], 2), prompt_keys(other, [1, 2, 3, 4], 2)
    assert len({root, other, *keys, *others}) == 6


@given(TOKENS, st.integers(1, 4))
@FEW
def test_there_is_one_key_for_each_full_block(tokens: list[int], block_size: int) -> None:
    keys = prompt_keys(b"root", tokens, block_size)
    assert len(keys) == len(set(keys)) == len(tokens) // block_size
    assert all(len(key) == KEY_BYTES for key in keys)


@given(TOKENS, TOKENS, st.integers(1, 4))
@FEW
def test_two_prompts_share_the_keys_of_what_they_have_in_common(
    one: list[int], other: list[int], block_size: int
) -> None:
    in_common = 0
    while in_common < min(len(one), len(other)) and one[in_common] == other[in_common]:
        in_common += 1
    keys, others = (prompt_keys(b"root", tokens, block_size) for tokens in (one, other))
    num_equal = in_common // block_size
    assert keys[:num_equal] == others[:num_equal]
    assert not set(keys[num_equal:]) & set(others[num_equal:])


@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.data())
@FEW
def test_one_token_changes_its_block_and_all_that_follow(
    tokens: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    keys, others = prompt_keys(b"root", tokens, 2), prompt_keys(b"root", changed, 2)
    equal = [key == other for key, other in zip(keys, others, strict=True)]
    assert equal == [index < place // 2 for index in range(len(keys))]


def test_a_prompts_keys_are_a_chain_of_block_keys() -> None:
    first = block_key(b"root", [1, 2])
    assert prompt_keys(b"root", [1, 2, 3, 4], 2) == [first, block_key(first, [3, 4])]


def test_a_token_that_is_no_token_id_is_not_hashed() -> None:
    for token in (-1, 2**32):
        with pytest.raises(OverflowError):
            block_key(b"root", [token])


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("uint8", 384), ("bfloat16", 768), ("float32", 1536), ("int8", 3 * 2 * 2 * 4 * (8 + 4))],
)
def test_a_block_holds_keys_and_values_of_all_layers(dtype: str, num_bytes: int) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype)
    assert layout.block_bytes == num_bytes


def test_a_message_carries_no_longer_keys_than_there_are() -> None:
    def opened(key: bytes) -> bytes:
        message = OpenHandoff(
            request_id="r", prefill_id="0" * 32, decode_id="0" * 32, tenant=b"", root_key=b"",
            keys=[key], num_tokens=16,
        )  # fmt: skip
        return encode(message)

    assert decoder(ToStore).decode(opened(b"k" * KEY_BYTES))
    with pytest.raises(ProtocolError, match="length <= 32"):
        decoder(ToStore).decode(opened(b"k" * (KEY_BYTES + 1)))
