"""Requests of the OpenAI API: what is read from a body, and the words for each wrong value."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams
from services.gateway.backend import Targets
from services.gateway.http.openai import params, schema
from services.gateway.http.openai.decoding import decode
from services.gateway.http.openai.prompts import parse_messages, parse_prompts, truncated
from services.gateway.http.openai.structured import parse_structure
from services.gateway.http.openai.template_options import template_options
from services.gateway.http.openai.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from services.gateway.text.generation import check_cache_salt


def completion(**values: Any) -> schema.CompletionRequest:
    body = json.dumps({"prompt": "x", **values}).encode()
    return decode(body, schema.CompletionRequest)


def chat(**values: Any) -> schema.ChatRequest:
    body = json.dumps({"messages": [], **values}).encode()
    return decode(body, schema.ChatRequest)


def prompts(value: object) -> list[str] | list[list[int]]:
    return parse_prompts(msgspec.Raw(json.dumps(value).encode()))


def sampling(**values: Any) -> SamplingParams:
    return params.sampling_params(completion(**values), max_tokens=5, logprobs=None)


def test_null_means_the_default_everywhere() -> None:
    names = [name for name in schema.CompletionRequest.__struct_fields__ if name != "prompt"]
    given, default = completion(**dict.fromkeys(names)), completion()
    raw = {name for name in names if getattr(default, name) is msgspec.UNSET}
    for name in set(names) - raw:
        assert getattr(given, name) == getattr(default, name)
    assert parse_structure(given) is None
    assert sampling(**dict.fromkeys(names)) == SamplingParams(max_tokens=5)


def test_sampling_fields_reach_the_sampler() -> None:
    given: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 7,
             "min_p": 0.1, "seed": 2**64 - 1,
             "presence_penalty": 1.0, "frequency_penalty": -1, "repetition_penalty": 1.5,
             "stop_token_ids": [9], "min_tokens": 2, "ignore_eos": True}  # fmt: skip
    assert sampling(**given) == SamplingParams(max_tokens=5, **given)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"temperature": "hot"}, "temperature", "expected `float | null`, got `str`"),
        ({"max_tokens": 1.5}, "max_tokens", "got `float`"),
        ({"n": True}, "n", "got `bool`"),
        ({"stop": [1]}, "stop[0]", "expected `str`"),
        ({"stream_options": 5}, "stream_options", "expected `object | null`"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "got `int`"),
    ],
)
def test_a_wrong_type_is_refused_by_field(values: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        completion(**values)
    assert error.value.field == field
    assert error.value.message.startswith(f"{field}: ")
    assert words in error.value.message


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"seed": 10**400}, None),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], field: str | None) -> None:
    with pytest.raises(InvalidRequestError) as error:
        sampling(**values)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "the body: expected `object`"),
        (b'{"prompt":"x"} {}', "not valid JSON"),
        (b'{"prompt":"x","temperature":NaN}', "not valid JSON"),
        (b'{"prompt":"x","temperature":Infinity}', "not valid JSON"),
        (b'{"prompt":"x","temperature":1e999}', "temperature: number out of range"),
        (b'{"prompt":"x","model":"\xff"}', "not valid JSON"),
        (b'{"prompt":"x","model":"\\ud800"}', "not valid JSON"),
        (b'{"prompt":"x","other":' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt":' + b"[" * 100_000, "nested too deeply"),
        (b"{}", "prompt is missing"),
    ],
)
def test_what_is_no_request_is_refused_in_words(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        decode(body, schema.CompletionRequest)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts_come_in_four_shapes(value: object, wanted: list[Any]) -> None:
    assert prompts(value) == wanted


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ("", "prompt", "prompt is empty"),
        ([], "prompt", "prompt is empty"),
        ([""], "prompt", "prompt is empty"),
        ([[]], "prompt", "prompt is empty"),
        (None, "prompt", "expected `str`, got `null`"),
        (5, "prompt", "expected `str`, got `int`"),
        ([5, "x"], "prompt[1]", "expected `int`, got `str`"),
        (["x", 5], "prompt[1]", "expected `str`, got `int`"),
        ([[5], [6, 0.5]], "prompt[1][1]", "expected `int`, got `float`"),
        ([[5]] * 129, "n", "at most 128 choices"),
    ],
)
def test_other_prompts_are_refused(value: object, field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        prompts(value)
    assert error.value.field == field


def test_choices_are_counted_over_all_prompts() -> None:
    assert params.num_choices(completion(n=8), 16) == (8, 8)
    assert params.num_choices(completion(n=2, best_of=8), 16) == (2, 8)
    for num_prompts, n in ((1, 129), (43, 3), (1, 0), (1, -1)):
        with pytest.raises(InvalidRequestError) as error:
            params.num_choices(completion(n=n), num_prompts)
        assert error.value.field == "n"


@pytest.mark.parametrize(
    "values", [{"n": 2, "best_of": 1}, {"best_of": 2, "stream": True}, {"best_of": 129}]
)
def test_best_of_is_at_least_n_and_never_streamed(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        params.num_choices(completion(**values), 1)
    assert error.value.field == "best_of"


def test_content_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    fields = chat(messages=[
        {"role": "user", "content": parts, "name": "ann", "unknown": [1]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ])  # fmt: skip
    assert parse_messages(fields.messages) == [
        {"role": "user", "content": "one\ntwo", "name": "ann"},
        {"role": "assistant"},
    ]


@pytest.mark.parametrize(
    ("messages", "field", "words"),
    [
        ([], "messages", "messages is empty"),
        ([{"content": "x"}], "messages[0].role", "messages\\[0\\].role is missing"),
        ([{"role": 5}], "messages[0].role", "expected `str`, got `int`"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "text"),
        ([{"role": "x", "tool_calls": [1]}], "messages[0].tool_calls[0]", "got `int`"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        parse_messages(chat(messages=messages).messages)
    assert error.value.field == field


def test_chat_logprobs_are_a_number_of_alternatives() -> None:
    assert params.chat_logprobs(chat()) is None
    assert params.chat_logprobs(chat(logprobs=False, top_logprobs=0)) is None
    assert params.chat_logprobs(chat(logprobs=True)) == 0
    assert params.chat_logprobs(chat(logprobs=True, top_logprobs=3)) == 3
    with pytest.raises(InvalidRequestError, match="needs logprobs"):
        params.chat_logprobs(chat(top_logprobs=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("functions", [{"name": "f"}]),
    ],
)
def test_what_would_change_the_answer_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is not supported yet") as error:
        CHAT_FIELDS.check(json.dumps({name: value}).encode())
    assert error.value.field == name


def test_default_values_of_unsupported_fields_are_accepted() -> None:
    defaults: dict[str, Any] = dict.fromkeys(CHAT_FIELDS.names)
    CHAT_FIELDS.check(json.dumps(defaults).encode())
    defaults.update(tools=[], tool_choice="auto")
    defaults.update(response_format={"type": "text"}, suffix="", length_penalty=1.0)
    CHAT_FIELDS.check(json.dumps(defaults, indent=4).encode())
    assert COMPLETION_FIELDS.names < CHAT_FIELDS.names


@pytest.mark.parametrize("salt", ["", "x" * 257])
def test_a_cache_salt_has_1_to_256_characters(salt: str) -> None:
    assert check_cache_salt(None) == ""
    assert check_cache_salt("x" * 256) == "x" * 256
    with pytest.raises(InvalidRequestError, match=f"1 to 256 characters, got {len(salt)}") as error:
        check_cache_salt(salt)
    assert error.value.field == "cache_salt"


def test_prompts_are_cut_from_the_left() -> None:
    prompt = list(range(1, 11))
    assert truncated(prompt, None, 5, 8) == prompt
    assert truncated(prompt, 3, 5, 8) == [8, 9, 10]
    assert truncated(prompt, 99, 5, 8) == prompt
    assert truncated(prompt, -1, 5, 8) == [8, 9, 10]
    assert truncated(prompt, -1, None, 8) == [4, 5, 6, 7, 8, 9, 10]
    assert truncated(prompt, -1, 100, 8) == [10]
    for most in (0, -2):
        with pytest.raises(InvalidRequestError) as error:
            truncated(prompt, most, 5, 8)
        assert error.value.field == "truncate_prompt_tokens"


def test_prompt_logprobs_may_be_a_number_or_a_switch() -> None:
    asked = [params.prompt_logprobs(completion(prompt_logprobs=each)) for each in (None, False)]
    assert asked == [None, None]
    assert params.prompt_logprobs(completion(prompt_logprobs=True)) == 0
    assert params.prompt_logprobs(completion(prompt_logprobs=3)) == 3


def test_biases_come_by_token_id_as_text() -> None:
    given = sampling(logit_bias={"5": 1, "70": -2.5}, allowed_token_ids=[5, 70])
    assert given.logit_bias == {5: 1.0, 70: -2.5}
    assert given.allowed_token_ids == [5, 70]
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        completion(logit_bias={"five": 1})


def test_the_newer_name_of_max_tokens_counts_on_both_endpoints() -> None:
    assert params.most_tokens(completion()) == 16
    assert params.most_tokens(chat()) is None
    for fields in (completion(max_tokens=3), chat(max_tokens=3), chat(max_completion_tokens=3)):
        assert params.most_tokens(fields) == 3
    assert params.most_tokens(completion(max_tokens=3, max_completion_tokens=4)) == 4


def test_targets_are_latencies_above_zero() -> None:
    assert params.targets(completion()) == Targets()
    assert params.targets(completion(ttft_target_ms=50, tpot_target_ms=2.5)) == Targets(50, 2.5)
    for field in ("ttft_target_ms", "tpot_target_ms"):
        for value in (0, -1, 1e12):
            with pytest.raises(InvalidRequestError) as error:
                params.targets(completion(**{field: value}))
            assert error.value.field == field


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"stream_interval": 4097}, "stream_interval"),
    ],
)
def test_streams_refuse_what_they_cannot_be(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        params.check_streaming(completion(**values))
    assert error.value.field == field


def test_a_template_gets_what_the_request_says() -> None:
    assert template_options(chat()) == {"add_generation_prompt": True}
    assert template_options(chat(add_generation_prompt=False)) == {"add_generation_prompt": False}
    assert template_options(chat(continue_final_message=True)) == {"add_generation_prompt": False}
    given = template_options(
        chat(
            chat_template_kwargs={"enable_thinking": False},
            documents=[{"title": "a"}],
            reasoning_effort="low",
        )
    )
    assert given == {
        "add_generation_prompt": True,
        "documents": [{"title": "a"}],
        "enable_thinking": False,
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "y" * 65536}}, "chat_template_kwargs"),
        ({"documents": [1]}, "documents[0]"),
        ({"documents": [{"x": "y" * 2**20}]}, "documents"),
    ],
)
def test_a_template_is_refused_the_rest(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        template_options(chat(**values))
    assert error.value.field == field
