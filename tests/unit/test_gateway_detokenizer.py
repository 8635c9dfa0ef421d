"""Text that grows token by token is the text of all tokens, cut before the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.gateway.text.detokenizer import Detokenizer, StopStrings
from tests.unit.gateway_fakes import DEMO, demo_model

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
BYTES = [TOKENIZER.token_to_id(token) for token in TOKENIZER.get_vocab() if len(token) == 1]

any_tokens = st.lists(st.integers(0, demo_model().vocab_size - 1), max_size=60)
single_bytes = st.lists(st.sampled_from(BYTES), max_size=60)
characters = st.text(max_size=30).map(
    lambda text: TOKENIZER.encode(text, add_special_tokens=False).ids
)


@given(token_ids=any_tokens | single_bytes | characters, skip=st.booleans())
def test_all_pieces_joined_are_the_full_decode(token_ids: list[int], skip: bool) -> None:
    detokenizer = demo_model().detokenizer(skip_special_tokens=skip)
    pieces = [detokenizer.add(token_id) for token_id in token_ids]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == TOKENIZER.decode(token_ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30))
def test_valid_text_never_shows_a_part_of_a_character(text: str) -> None:
    detokenizer = demo_model().detokenizer()
    shown = ""
    for token_id in TOKENIZER.encode(text, add_special_tokens=False).ids:
        shown += detokenizer.add(token_id)
        assert text.startswith(shown)
    assert shown.endswith(text.rstrip("\ufffd"))


def test_a_character_over_several_tokens_comes_with_the_last() -> None:
    token_ids = TOKENIZER.encode("🦊", add_special_tokens=False).ids
    assert len(token_ids) == 4
    detokenizer = demo_model().detokenizer()
    assert [detokenizer.add(token_id) for token_id in token_ids] == ["", "", "", "🦊"]
    assert detokenizer.flush() == ""


def test_flush_is_empty_the_second_time() -> None:
    detokenizer = demo_model().detokenizer()
    first = demo_model().encode("é", add_special_tokens=False)[0]
    assert detokenizer.add(first) == ""
    assert (detokenizer.flush(), detokenizer.flush()) == ("\ufffd", "")


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    detokenizer = demo_model().detokenizer()
    hello = TOKENIZER.encode("hello", add_special_tokens=False).ids
    text = "".join(detokenizer.add(token_id) for token_id in [*[90_000] * 30, *hello])
    assert text + detokenizer.flush() == "hello"


def test_the_window_stays_small_whatever_comes() -> None:
    widths: list[int] = []

    def decode(token_ids: list[int]) -> str:
        widths.append(len(token_ids))
        text: str = TOKENIZER.decode(token_ids)
        return text

    detokenizer = Detokenizer(decode)
    continuation = demo_model().encode("\u0400", add_special_tokens=False)[1]
    assert TOKENIZER.id_to_token(continuation) == "Ģ"  # the byte 0x80, never whole
    for token_id in [continuation] * 500 + [90_000] * 500 + [100] * 500:
        detokenizer.add(token_id)
    assert max(widths) < 20


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama 2 has: blanks are part of tokens, unknown characters are bytes."""
    vocab = {"<unk>": 0, "▁": 1, "▁Hello": 2, "▁world": 3, "!": 4, "a": 5}
    vocab |= {f"<0x{byte:02X}>": 10 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return tokenizer


words = st.sampled_from([[1], [2], [3], [4], [5], [10 + 0xC3, 10 + 0xA9]])
fox = [10 + byte for byte in "🦊".encode()]


@given(parts=st.lists(words | st.just(fox), max_size=30))
@example(parts=[fox] * 12)
@example(parts=[[1], [2], [1], [3]])
def test_blanks_and_byte_tokens_of_sentencepiece_come_out_right(parts: list[list[int]]) -> None:
    tokenizer = sentencepiece()
    token_ids = [token_id for part in parts for token_id in part]
    detokenizer = Detokenizer(tokenizer.decode)
    text = "".join(detokenizer.add(token_id) for token_id in token_ids) + detokenizer.flush()
    assert text == tokenizer.decode(token_ids)


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The plain definition: the shortest beginning that ends in a stop string, without it."""
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


few_letters = st.text("ab", max_size=6)


@given(
    pieces=st.lists(few_letters, max_size=12),
    stop=st.lists(few_letters.filter(bool), max_size=4),
)
@example(pieces=["ab", "cd"], stop=["abcd", "bc"])
@example(pieces=["aab"], stop=["ab", "aab"])
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    shown = ""
    wanted, matched = cut("".join(pieces), stop)
    for piece in pieces:
        shown += stops.add(piece)
        assert wanted.startswith(shown)
        if stops.matched is not None:
            break
    assert stops.matched == matched
    assert shown + ("" if matched else stops.flush()) == wanted


@given(
    pieces=st.lists(few_letters, max_size=12),
    stop=st.lists(few_letters.filter(bool), max_size=4),
)
def test_the_stop_string_is_shown_on_request(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop, is_shown=True)
    wanted, matched = cut("".join(pieces), stop)
    shown = "".join(stops.add(piece) for piece in pieces if stops.matched is None)
    assert stops.matched == matched
    assert shown + ("" if matched else stops.flush()) == wanted + (matched or "")


@pytest.mark.parametrize(
    ("text", "stop", "held"),
    [("abc", ["cd"], "c"), ("aaa", ["aab"], "aa"), ("abc", ["x"], ""), ("abc", [], "")],
)
def test_only_a_possible_beginning_is_held_back(text: str, stop: list[str], held: str) -> None:
    stops = StopStrings(stop)
    assert stops.add(text) == text.removesuffix(held)
    assert stops.flush() == held
