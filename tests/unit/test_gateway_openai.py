"""Requests of the OpenAI API: what is read from a body, and the words for each wrong value."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kvbaton.errors import InvalidRequestError, OverloadedError
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest
from services.gateway.generation import check_cache_salt
from services.gateway.openai import schema
from services.gateway.openai.choices import Choices, Job
from services.gateway.openai.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from services.gateway.quotas import Charge, Limits, Quota
from tests.unit.gateway_fakes import (
    FakeBackend,
    FakeRng,
    RefusedError,
    Script,
    demo_model,
    says,
)


class StillClock:
    def now(self) -> float:
        return 0.0


def completion(**values: Any) -> schema.CompletionRequest:
    body = json.dumps({"prompt": "x", **values}).encode()
    return schema.decode(body, schema.CompletionRequest)


def chat(**values: Any) -> schema.ChatRequest:
    body = json.dumps({"messages": [], **values}).encode()
    return schema.decode(body, schema.ChatRequest)


def prompts(value: object) -> list[str] | list[list[int]]:
    return schema.parse_prompts(msgspec.Raw(json.dumps(value).encode()))


def params(**values: Any) -> SamplingParams:
    return schema.sampling_params(completion(**values), max_tokens=5, logprobs=None)


def job(num_prompts: int, n: int, **values: Any) -> Job:
    return Job(
        request_id="http-1",
        prompts=[[5 + index] for index in range(num_prompts)],
        n=n,
        sampling=params(**values),
        stop=(),
        skip_special_tokens=True,
        cache_salt="",
        cache_tenant="acme",
        charge=Charge(Quota(Limits(), 0), 0),
        rng=FakeRng(),
        received_at=0.0,
    )


def choices(job: Job, backend: FakeBackend) -> Choices:
    return Choices(job, backend, demo_model(), StillClock())


def test_null_means_the_default_everywhere() -> None:
    names = [name for name in schema.CompletionRequest.__struct_fields__ if name != "prompt"]
    assert completion(**dict.fromkeys(names)) == completion()
    assert params(**dict.fromkeys(names)) == SamplingParams(max_tokens=5)


def test_sampling_fields_reach_the_sampler() -> None:
    given: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 7,
             "min_p": 0.1, "seed": 2**64 - 1,
             "presence_penalty": 1.0, "frequency_penalty": -1, "repetition_penalty": 1.5,
             "stop_token_ids": [9], "min_tokens": 2, "ignore_eos": True}  # fmt: skip
    assert params(**given) == SamplingParams(max_tokens=5, **given)


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
        params(**values)
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
        schema.decode(body, schema.CompletionRequest)


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
    schema.check_num_choices(16, 8)
    for num_prompts, n in ((1, 129), (43, 3), (1, 0), (1, -1)):
        with pytest.raises(InvalidRequestError) as error:
            schema.check_num_choices(num_prompts, n)
        assert error.value.field == "n"


def test_content_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    fields = chat(messages=[
        {"role": "user", "content": parts, "name": "ann", "unknown": [1]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ])  # fmt: skip
    assert schema.parse_messages(fields.messages) == [
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
        ([{"role": "x", "tool_calls": [1]}], "messages[0].tool_calls", "not supported yet"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        schema.parse_messages(chat(messages=messages).messages)
    assert error.value.field == field


def test_chat_logprobs_are_a_number_of_alternatives() -> None:
    assert schema.chat_logprobs(chat()) is None
    assert schema.chat_logprobs(chat(logprobs=False, top_logprobs=0)) is None
    assert schema.chat_logprobs(chat(logprobs=True)) == 0
    assert schema.chat_logprobs(chat(logprobs=True, top_logprobs=3)) == 3
    with pytest.raises(InvalidRequestError, match="needs logprobs"):
        schema.chat_logprobs(chat(top_logprobs=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"a": [1] * 99}}}),
        ("logit_bias", {"5": 1}),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("guided_json", {"type": "object"}),
        ("prompt_logprobs", 1),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
    ],
)
def test_what_would_change_the_answer_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is not supported yet") as error:
        CHAT_FIELDS.check(json.dumps({name: value}).encode())
    assert error.value.field == name


def test_default_values_of_unsupported_fields_are_accepted() -> None:
    defaults: dict[str, Any] = dict.fromkeys(CHAT_FIELDS.names)
    CHAT_FIELDS.check(json.dumps(defaults).encode())
    defaults.update(tools=[], tool_choice="auto", echo=False, best_of=1, logit_bias={})
    defaults.update(response_format={"type": "text"}, suffix="", length_penalty=1.0)
    CHAT_FIELDS.check(json.dumps(defaults, indent=4).encode())
    assert COMPLETION_FIELDS.names < CHAT_FIELDS.names
    assert not CHAT_FIELDS.names & set(schema.ChatRequest.__struct_fields__)


async def test_choices_of_a_prompt_share_a_seed_and_have_numbers() -> None:
    backend = FakeBackend()
    await choices(job(num_prompts=2, n=3), backend).close()
    sent = [(request.prompt, request.sampling.seed, request.choice) for request in backend.requests]
    assert sent == [([5], 1, 0), ([5], 1, 1), ([5], 1, 2), ([6], 2, 0), ([6], 2, 1), ([6], 2, 2)]
    assert len({request.request_id for request in backend.requests}) == 6
    assert backend.requests[0].request_id == "http-1"
    assert {each.request_id.partition("#")[0] for each in backend.requests} == {"http-1"}


async def test_a_given_seed_is_every_choices_seed() -> None:
    backend = FakeBackend()
    await choices(job(num_prompts=2, n=2, seed=77), backend).close()
    assert [request.sampling.seed for request in backend.requests] == [77] * 4


async def test_all_choices_come_in_order_and_are_counted() -> None:
    texts = {(5, 0): "one two", (5, 1): "three", (6, 0): "four five six", (6, 1): "seven"}

    def script(request: GenerationRequest) -> Script:
        return says(texts[request.prompt[0], request.choice], stops=True)

    backend = FakeBackend(script)
    backend.num_cached_tokens = 1
    several = choices(job(num_prompts=2, n=2), backend)
    shown = [""] * len(several)
    async for index, token in several:
        shown[index] += token.text
    assert shown == list(texts.values())
    usage = several.usage()
    num_output = sum(len(says(text, stops=True)) for text in texts.values())
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, num_output)
    assert usage.total_tokens == 2 + num_output
    assert usage.prompt_tokens_details.cached_tokens == 2
    await several.close()


async def test_one_refused_choice_frees_those_before_it() -> None:
    def script(request: GenerationRequest) -> Script:
        return [RefusedError(OverloadedError("full"))] if request.choice == 2 else []

    backend = FakeBackend(script)
    with pytest.raises(OverloadedError):
        choices(job(num_prompts=1, n=3), backend)
    assert [stream.num_cancels for stream in backend.streams] == [1, 1]


async def test_one_failed_choice_fails_all() -> None:
    def script(request: GenerationRequest) -> Script:
        return [OverloadedError("preempted")] if request.choice == 1 else says("x y z")

    several = choices(job(num_prompts=1, n=2), FakeBackend(script))
    with pytest.raises(OverloadedError, match="preempted"):
        [token async for token in several]
    await several.close()


@pytest.mark.parametrize("salt", ["", "x" * 257])
def test_a_cache_salt_has_1_to_256_characters(salt: str) -> None:
    assert check_cache_salt(None) == ""
    assert check_cache_salt("x" * 256) == "x" * 256
    with pytest.raises(InvalidRequestError, match=f"1 to 256 characters, got {len(salt)}") as error:
        check_cache_salt(salt)
    assert error.value.field == "cache_salt"
