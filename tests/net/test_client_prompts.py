"""What a request says of its prompt and of its output's form, over the msgpack face."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from kvbaton import AsyncClient
from kvbaton.conversation import ChatMessage, FunctionCall, ToolCall
from kvbaton.errors import InvalidRequestError, ProtocolError, UnprocessableError
from kvbaton.protocol import Accepted, Done, Generate, Resume, Tokens
from kvbaton.questions import Prompt
from kvbaton.request import RequestOptions
from kvbaton.sampling import SamplingParams
from services.gateway.backend import Targets
from tests.net.gateways import (
    raw_client,
    running_face,
    scripted_gateway,
)
from tests.unit.gateway_fakes import FakeBackend, demo_model, events, says

MEASURE = {
    "type": "function",
    "function": {"name": "measure", "parameters": {"type": "object", "properties": {}}},
}
HELLO = {"role": "user", "content": "hello"}


async def test_echo_gives_the_prompt_before_the_answer() -> None:
    async with (
        running_face(FakeBackend(lambda _: says(" four"))) as face,
        AsyncClient(face.endpoint) as client,
    ):
        plain = await client.generate("one two three", echo=True).finish()
        likely = await client.generate("one two three", echo=True, logprobs=1).finish()
    assert plain.text == likely.text == "one two three four"
    assert [token.logprob for token in plain.prompt] == [None] * len(plain.prompt)
    assert [token.token_id for token in plain.prompt] == demo_model().encode("one two three")
    assert likely.prompt[0].logprob is None
    assert [token.logprob for token in likely.prompt[1:3]] == [-1.0, -2.0]
    assert likely.prompt[1].top_logprobs == [(likely.prompt[1].token_id + 1, -0.1)]


async def test_prompt_logprobs_do_not_change_the_text() -> None:
    backend = FakeBackend(lambda _: says(" four"))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = await client.generate("one", prompt_logprobs=0, n=2).finish()
    assert [choice.text for choice in stream.choices] == [" four", " four"]
    assert len(stream.prompt) == len(backend.requests[0].prompt)
    assert [request.sampling.prompt_logprobs for request in backend.requests] == [0, None]


async def test_a_long_prompt_comes_in_several_messages() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(
            Generate(id=1, token_ids=[5] * 1200, sampling=SamplingParams(prompt_logprobs=0))
        )
        parts = [await client.receive() for _ in range(3)]
    assert all(isinstance(part, Prompt) for part in parts)
    indexes = [token.index for part in parts if isinstance(part, Prompt) for token in part.tokens]
    assert indexes == list(range(1200))


async def test_a_prompt_is_not_told_twice() -> None:
    """The first gateway is lost before its first token, the second after it."""
    backend = FakeBackend(lambda _: says("x"))
    async with running_face(backend) as face, raw_client(face.endpoint) as raw:
        await raw.hello()
        raw.send(Generate(id=1, text="one two", echo=True, sampling=SamplingParams(seed=7)))
        prompt = await raw.receive()
        assert isinstance(prompt, Prompt)
        tokens = await raw.receive()
        raw.send(
            Generate(
                id=2,
                text="one two",
                echo=True,
                resume=Resume(request_id="a" * 32, seed=7, tokens=[5]),
            )
        )
        await raw.receive()
        assert isinstance(await raw.receive(), Tokens), "whoever has tokens has the prompt"
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("one two", echo=True)
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Accepted(id=1, request_id="a" * 32, seed=7))
        gateway.send(prompt)
    async with scripted_gateway(gateway.endpoint) as again:
        await again.welcome("instance-2")
        await again.receive()
        again.send(prompt)
        again.send(tokens)
        await anext(stream)
        assert stream.prompt == prompt.tokens
        await client.close()


async def test_options_reach_the_backend_as_the_http_api_would_have_them() -> None:
    backend = FakeBackend(lambda _: events([5]))
    options: RequestOptions = {
        "logit_bias": {"88": -100, "7": 1.5},
        "allowed_token_ids": range(5, 9),
        "bad_words": ["eval", [5, 6]],
        "priority": -3,
        "session_id": "s",
        "ttft_target_ms": 100,
        "tpot_target_ms": 10.5,
        "truncate_prompt_tokens": 2,
        "cache_salt": "salt",
        "user": "someone",
    }
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        await client.generate("one two three", **options).finish()
    (request,) = backend.requests
    assert request.prompt == demo_model().encode("one two three")[-2:]
    assert request.sampling.logit_bias == {88: -100.0, 7: 1.5}
    assert request.sampling.allowed_token_ids == [5, 6, 7, 8]
    eval_ids = demo_model().encode("eval", add_special_tokens=False)
    assert request.sampling.bad_words[:2] == [[5, 6], eval_ids]
    assert (request.priority, request.session_id, request.cache_salt) == (-3, "s", "salt")
    assert request.targets == Targets(ttft_ms=100.0, tpot_ms=10.5)


async def test_special_tokens_are_added_and_shown_as_asked() -> None:
    backend = FakeBackend(lambda _: says("x", stops=True))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        bare = client.generate("x", add_special_tokens=False, stop="never")
        await bare.finish()
        shown = client.generate(
            "x", skip_special_tokens=False, include_stop_str_in_output=True, echo=True
        )
        await shown.finish()
    assert backend.requests[0].prompt == demo_model().encode("x", add_special_tokens=False)
    assert bare.text == "x"
    bos, eos = (demo_model().token_text(each) for each in (0, 1))
    assert shown.text == f"{bos}xx{eos}"


async def test_a_stop_string_is_shown_where_it_is_asked_for() -> None:
    async with (
        running_face(FakeBackend(lambda _: says("one two three"))) as face,
        AsyncClient(face.endpoint) as client,
    ):
        stream = client.generate("x", stop=" two", include_stop_str_in_output=True)
        await stream.finish()
    assert stream.text == "one two"


async def test_a_conversation_goes_on_from_its_last_message() -> None:
    backend = FakeBackend(lambda _: events([5]))
    turns = [HELLO, {"role": "assistant", "content": "Well, "}]
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        await client.generate(messages=turns, continue_final_message=True).finish()
        await client.generate(messages=[HELLO], add_generation_prompt=False).finish()
        with pytest.raises(InvalidRequestError, match="cannot both be true"):
            await client.generate(
                messages=turns, continue_final_message=True, add_generation_prompt=True
            ).finish()
        with pytest.raises(InvalidRequestError, match="must not have messages"):
            await client.generate(messages=turns, chat_template_kwargs={"messages": []}).finish()
    model = demo_model()
    assert model.decode(backend.requests[0].prompt).endswith("Well, ")
    assert backend.requests[1].prompt == await model.chat([HELLO], add_generation_prompt=False)


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["warm", "cold"]}},
        {"structured_outputs": {"regex": "[a-z]+"}},
    ],
)
async def test_structured_output_becomes_a_grammar(options: RequestOptions) -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        await client.generate("x", **options).finish()
        await client.generate(**{"messages": [HELLO], **options}).finish()  # type: ignore[arg-type]
    first, second = (request.sampling.grammar for request in backend.requests)
    assert first == second != ""


CALL = '<tool_call>{"name": "measure", "arguments": {"a": 1}}</tool_call>'


async def test_calls_of_tools_are_told_at_the_end() -> None:
    async with (
        running_face(FakeBackend(lambda _: says(f"Well {CALL}", stops=True))) as face,
        AsyncClient(face.endpoint) as client,
    ):
        stream = await client.generate(messages=[HELLO], tools=[MEASURE]).finish()
        free = await client.generate(messages=[HELLO], tools=[MEASURE], tool_choice="none").finish()
        call = stream.tool_calls[0]
        answered: list[Any] = [
            HELLO,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call.id, "content": "21"},
        ]
        await client.generate(messages=answered, tools=[MEASURE]).finish()
    assert call == ToolCall(id=call.id, function=FunctionCall(name="measure", arguments='{"a": 1}'))
    assert stream.finish_reason == "tool_calls"
    assert (stream.choices[0].content or "").strip() == "Well"
    assert stream.text == f"Well {CALL}"
    assert (free.finish_reason, free.tool_calls) == ("stop", [])


async def test_the_end_with_its_calls_is_told_again_when_it_alone_was_lost() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(
            Generate(
                id=1,
                messages=[ChatMessage(role="user", content="hello")],
                resume=Resume(
                    request_id="a" * 32,
                    seed=1,
                    tokens=[event.token_id for event in says(CALL, stops=True)],
                    finish_reason="stop",
                ),
                tools=[MEASURE],
            )
        )
        _, done = await client.answers()
    assert isinstance(done, Done)
    assert done.finish_reason == "tool_calls"
    assert [call.function.name for call in done.choices[0].tool_calls] == ["measure"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"logit_bias": {10**6: 1}}, "logit_bias"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [[10**6]]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"priority": 2**31}, "priority"),
        ({"session_id": "\n"}, "session_id"),
        ({"ttft_target_ms": 0}, "ttft_target_ms"),
        ({"tpot_target_ms": float("nan")}, "tpot_target_ms"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "x", "choice": ["y"]}}, "structured_outputs.choice"),
    ],
)
async def test_each_option_is_held_to_its_limits(options: RequestOptions, field: str) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.generate("x", **options).finish()
        assert caught.value.field == field
        assert backend.requests == []


async def test_a_grammar_of_the_cluster_is_not_taken_from_clients() -> None:
    async with running_face(FakeBackend()) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x", sampling=SamplingParams(grammar="{}")))
        _, error = await client.answers()
        assert getattr(error, "field", None) == "grammar"


@pytest.mark.parametrize("depth", [10, 400, 900, 100_000])
async def test_deep_nesting_does_no_harm(depth: int) -> None:
    deep: Any = {}
    for _ in range(depth):
        deep = {"x": deep}
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        options: list[RequestOptions] = [
            {"messages": [HELLO], "chat_template_kwargs": deep},
            {"token_ids": [5], "response_format": deep},
            {"token_ids": [5], "structured_outputs": {"json": deep}},
        ]
        for each in options:
            with contextlib.suppress(InvalidRequestError, ProtocolError, UnprocessableError):
                await client.generate(**each).finish()
                assert depth < 1000
        await client.generate("x").finish()
