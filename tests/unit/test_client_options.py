"""From keyword arguments to a `generate` message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvbaton.conversation import ChatMessage
from kvbaton.errors import TooLargeError, UnprocessableError
from kvbaton.protocol import MAX_REQUEST_BYTES, Generate, client_message_decoder
from kvbaton.request import encode_request, make_request
from kvbaton.sampling import SamplingParams


def request(text: str | None = None, **options: Any) -> Generate:
    raw = encode_request(make_request(7, text, options))  # type: ignore[arg-type]
    message = client_message_decoder().decode(raw)
    assert isinstance(message, Generate)
    return message


def test_options_become_fields() -> None:
    assert request(
        "x", model="demo", stop=("a", "b"), deadline_s=1.5, max_tokens=3, temperature=0, top_k=None
    ) == Generate(
        id=7,
        text="x",
        model="demo",
        stop=["a", "b"],
        deadline_ms=1500,
        sampling=SamplingParams(max_tokens=3, temperature=0.0),
    )


def test_a_prompt_may_be_token_ids_or_messages() -> None:
    assert request(token_ids=range(3)).token_ids == [0, 1, 2]
    hello = ChatMessage(role="user", content="hello")
    assert request(messages=[{"role": "user", "content": "hello"}]).messages == [hello]
    assert request(messages=[hello]).messages == [hello]


def test_one_stop_string_needs_no_list() -> None:
    assert request("x", stop="end").stop == ["end"]


def test_a_deadline_is_rounded_up_and_a_past_one_is_left_to_the_gateway() -> None:
    assert request("x", deadline_s=0.0001).deadline_ms == 1
    assert request("x", deadline_s=-0.5).deadline_ms == -500


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": "3"},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"ignore_eos": 1},
        {"token_ids": ["1"]},
        {"token_ids": 5},
        {"token_ids": [2**64]},
        {"seed": 2**70},
        {"messages": [{"content": "x"}]},
        {"messages": ["hello"]},
        {"stop": [b"x"]},
        {"model": 1},
        {"deadline_s": math.nan},
        {"deadline_s": math.inf},
        {"deadline_s": "soon"},
        {"deadline_s": 1e30},
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_it_is_sent(options: dict[str, Any]) -> None:
    with pytest.raises(UnprocessableError, match="not a request of this protocol"):
        request(None, **options)


def test_text_that_is_not_unicode_is_refused_before_it_is_sent() -> None:
    with pytest.raises(UnprocessableError, match="surrogates not allowed"):
        request("\ud800")


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"no option max_token, top-k"):
        request("x", max_token=3, **{"top-k": 1})


def test_a_request_over_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TooLargeError, match=f"the limit is {MAX_REQUEST_BYTES}"):
        request("x" * MAX_REQUEST_BYTES)


def test_bad_words_are_texts_or_tokens_and_biases_have_numbers_for_keys() -> None:
    message = request("x", bad_words=["a", (5, 6)], logit_bias={"7": -1, 8: 2}, n=2)
    assert message.bad_words == ["a"]
    assert message.sampling == SamplingParams(bad_words=[[5, 6]], logit_bias={7: -1.0, 8: 2.0})
    assert message.n == 2


def test_the_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (turn,) = request(messages=[{"role": "user", "content": parts}]).messages or []
    assert turn.content == "a\nb"
    with pytest.raises(UnprocessableError, match="only those of type text"):
        request(messages=[{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words": [5]},
        {"bad_words": [[b"x"]]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": [1]},
        {"tools": [5]},
        {"response_format": {"type": object()}},
        {"n": "2"},
    ],
)
def test_options_of_the_wrong_type_are_refused_before_they_are_sent(
    options: dict[str, Any],
) -> None:
    with pytest.raises(UnprocessableError, match="not a request of this protocol"):
        request("x", **options)
