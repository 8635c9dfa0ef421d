"""Tokens become text in order; stop strings, limits and failures end it in the right words."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton.errors import InvalidRequestError, KvbatonError, UnavailableError
from kvbaton.protocol import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, TokenEvent
from services.gateway.text.generation import (
    Generation,
    TextOutput,
    TextToken,
    bad_word_tokens,
    check_prompt,
    check_stop,
    tokenize,
)
from tests.unit.gateway_fakes import (
    EOS,
    FakeStream,
    Script,
    demo_model,
    events,
    says,
)


def stream_of(script: Script) -> FakeStream:
    stream = FakeStream(GenerationRequest("0" * 32, [5], SamplingParams()))
    stream.feed(script)
    return stream


def generation_of(
    script: Script, stop: list[str] | None = None, min_tokens: int = 0
) -> tuple[Generation, FakeStream]:
    stream = stream_of(script)
    output = TextOutput(demo_model().detokenizer(), stop or (), min_tokens=min_tokens)
    return Generation(stream, output), stream


async def read(generation: Generation) -> list[TextToken]:
    return [token async for token in generation]


async def test_each_token_gives_one_piece_of_text() -> None:
    script = says("hello world 🦊")
    generation, stream = generation_of(script)
    tokens = await read(generation)
    assert [token.index for token in tokens] == list(range(len(script)))
    assert "".join(token.text for token in tokens) == "hello world 🦊"
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == "length"
    assert generation.num_output_tokens == len(script)
    assert stream.num_cancels == 0


async def test_eos_counts_but_has_no_text() -> None:
    generation, _ = generation_of(says("hello", stops=True))
    tokens = await read(generation)
    assert "".join(token.text for token in tokens) == "hello"
    assert (tokens[-1].token_id, tokens[-1].text, tokens[-1].finish_reason) == (EOS, "", "stop")
    assert generation.num_output_tokens == len(tokens)


async def test_a_stop_token_of_plain_text_is_not_shown() -> None:
    token_ids = demo_model().encode("hello world", add_special_tokens=False)
    generation, _ = generation_of(events(token_ids, "stop"))
    text = "".join([token.text async for token in generation])
    assert text == demo_model().detokenizer().add(token_ids[0]) + "".join(
        demo_model().token_text(token_id) for token_id in token_ids[1:-1]
    )


async def test_a_stop_string_over_tokens_ends_the_text_and_frees_the_request() -> None:
    generation, stream = generation_of(says("one two three four"), [" three"])
    tokens = await read(generation)
    assert "".join(token.text for token in tokens) == "one two"
    assert tokens[-1].finish_reason == "stop"
    assert generation.num_output_tokens == len(tokens) < len(says("one two three four"))
    assert stream.num_cancels == 1
    assert await read(generation) == []


async def test_what_may_be_a_stop_string_comes_with_the_last_token() -> None:
    generation, _ = generation_of(says("one two"), [" two three"])
    tokens = await read(generation)
    assert "".join(token.text for token in tokens[:-1]) == "one"
    assert (tokens[-1].text, tokens[-1].finish_reason) == (" two", "length")


async def test_a_stop_string_in_the_last_token_wins_over_the_length() -> None:
    generation, stream = generation_of(says("one two"), ["two"])
    tokens = await read(generation)
    assert "".join(token.text for token in tokens) == "one "
    assert tokens[-1].finish_reason == "stop"
    assert stream.num_cancels == 0


async def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    script = says("a b a b")
    generation, _ = generation_of(script, ["b"], min_tokens=len(script) - 1)
    tokens = await read(generation)
    assert "".join(token.text for token in tokens) == "a b a "
    assert tokens[-1].finish_reason == "stop"


async def test_an_incomplete_character_at_the_end_shows_as_replacement() -> None:
    token_ids = demo_model().encode("a🦊", add_special_tokens=False)[:-1]
    generation, _ = generation_of(events(token_ids))
    tokens = await read(generation)
    assert [token.text for token in tokens] == ["a", "", "", "\ufffd"]


async def test_a_failure_of_the_stream_is_raised() -> None:
    generation, _ = generation_of([*says("hello there")[:1], UnavailableError("gone")])
    await anext(generation)
    with pytest.raises(UnavailableError, match="gone"):
        await anext(generation)


async def test_a_stream_that_ends_too_early_is_an_error() -> None:
    class Short(FakeStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            yield TokenEvent(0, 100)

    stream = Short(GenerationRequest("0" * 32, [5], SamplingParams()))
    generation = Generation(stream, TextOutput(demo_model().detokenizer()))
    with pytest.raises(KvbatonError, match="ended before its last token"):
        await read(generation)


@pytest.mark.parametrize(
    "stop", [[""], ["x"] * (MAX_STOP_STRINGS + 1), ["x" * (MAX_STOP_STRING_CHARS + 1)]]
)
def test_stop_strings_have_limits(stop: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        check_stop(stop)
    assert error.value.field == "stop"
    check_stop(["x" * MAX_STOP_STRING_CHARS] * MAX_STOP_STRINGS)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt is empty"),
        ([5] * 10, "has 10 tokens.*context of 10 tokens"),
        ([5, 100], "token id 100, the model's are 0 to 99"),
        ([-1, 5], "token id -1"),
        ([2**80], "token id"),
    ],
)
def test_a_prompt_must_fit_the_model(prompt: list[int], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        check_prompt(prompt, 100, 10)
    assert error.value.field == "prompt"


def test_a_prompt_that_leaves_room_for_one_token_fits() -> None:
    check_prompt([0, 99] * 4 + [5], 100, 10)
    check_prompt([5] * 10_000, 100, None)


def test_bad_words_are_banned_as_vllm_does() -> None:
    ids = {"one": [5], " one": [6], "two": [5, 7], " two": [8], "x": [9], " x": [9]}
    found = bad_word_tokens(["one", "  two", " x"], ids.__getitem__)
    assert found == [[5], [6], [5, 7], [9]], "a blank counts where it makes another token of one"
    for words in (["one", ""], ["  "], ["x" * 1025], ["x"] * 129):
        with pytest.raises(InvalidRequestError) as error:
            bad_word_tokens(words, lambda _: [5])
        assert error.value.field == "bad_words"


async def test_much_text_is_tokenized_off_the_loop() -> None:
    loop = asyncio.get_running_loop()

    def is_on_loop() -> bool:
        try:
            return asyncio.get_running_loop() is loop
        except RuntimeError:
            return False

    assert await tokenize(100, is_on_loop)
    assert not await tokenize(100_000, is_on_loop)
