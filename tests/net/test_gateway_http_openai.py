"""The openai package, as users have it, against the HTTP face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from kvbaton.errors import InvalidRequestError, OverloadedError, UnavailableError
from services.gateway.backend import GenerationRequest
from tests.unit.gateway_fakes import (
    FakeBackend,
    RefusedError,
    Script,
    demo_model,
    running_face,
    says,
)

TEXT = "def größe(): 🦊"
PROMPT = demo_model().encode("hello")
MESSAGES: Any = [{"role": "user", "content": "hello"}]


def answers(text: str, *, stops: bool = False) -> FakeBackend:
    return FakeBackend(lambda _request: says(text, stops=stops))


@asynccontextmanager
async def client_of(backend: FakeBackend) -> AsyncIterator[AsyncOpenAI]:
    async with (
        running_face(backend) as face,
        AsyncOpenAI(
            base_url=f"http://127.0.0.1:{face.port}/v1", api_key="none", max_retries=0
        ) as client,
    ):
        yield client


async def test_a_whole_completion() -> None:
    backend = answers(TEXT)
    backend.num_cached_tokens = 1
    async with client_of(backend) as client:
        answer = await client.completions.create(model="demo", prompt="hello")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "demo"
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(says(TEXT))
    assert answer.usage.total_tokens == len(PROMPT) + len(says(TEXT))
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    (request,) = backend.requests
    assert request.prompt == PROMPT
    assert request.sampling.max_tokens == 16
    assert request.sampling.seed is not None
    assert backend.streams[0].num_cancels == 1  # closing is idempotent


async def test_a_streamed_completion_has_a_chunk_for_each_token() -> None:
    async with client_of(answers(TEXT, stops=True)) as client:
        stream = await client.completions.create(
            model="demo", prompt="hello", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *tokens, last = chunks
    assert len(tokens) == len(says(TEXT, stops=True))
    assert "".join(chunk.choices[0].text for chunk in tokens) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in tokens[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in tokens)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(tokens)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_with_every_chunk() -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    async with client_of(answers("one two")) as client:
        stream = await client.completions.create(
            model="demo", prompt="hello", stream=True, stream_options=options
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    num_tokens = len(says("one two"))
    assert counts == [*range(1, num_tokens + 1), num_tokens]


async def test_a_whole_chat() -> None:
    backend = answers(TEXT, stops=True)
    async with client_of(backend) as client:
        answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", TEXT)
    assert answer.choices[0].finish_reason == "stop"
    assert backend.requests[0].prompt == await demo_model().chat(MESSAGES)
    assert backend.requests[0].sampling.max_tokens is None


async def test_a_streamed_chat_begins_with_the_role() -> None:
    async with client_of(answers(TEXT)) as client:
        stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        first, *rest = [chunk async for chunk in stream]
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert len(rest) == len(says(TEXT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == TEXT
    assert all(chunk.choices[0].delta.role is None for chunk in rest)
    assert rest[-1].choices[0].finish_reason == "length"


async def test_the_synchronous_client() -> None:
    def ask(port: int) -> tuple[str, str, list[str]]:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            whole = client.completions.create(model="demo", prompt="hello").choices[0].text
            stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return whole, text, [model.id for model in client.models.list()]

    async with running_face(answers(TEXT)) as face:
        assert await asyncio.to_thread(ask, face.port) == (TEXT, TEXT, ["demo"])


async def test_choices_of_prompts_are_numbered_as_openai_does() -> None:
    def script(request: GenerationRequest) -> Script:
        return says(f"{demo_model().token_text(request.prompt[-1])} {request.choice}")

    prompts = ["alpha", "beta"]
    wanted = [
        f"{demo_model().token_text(demo_model().encode(prompt)[-1])} {choice}"
        for prompt in prompts
        for choice in (0, 1)
    ]
    async with client_of(FakeBackend(script)) as client:
        answer = await client.completions.create(model="demo", prompt=prompts, n=2)
        stream = await client.completions.create(model="demo", prompt=prompts, n=2, stream=True)
        texts = [""] * 4
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == wanted
    assert texts == wanted


async def test_every_choice_of_a_streamed_chat_begins_with_the_role() -> None:
    async with client_of(answers("yes")) as client:
        stream = await client.chat.completions.create(
            model="demo", messages=MESSAGES, n=3, stream=True
        )
        choices = [chunk.choices[0] async for chunk in stream]
    for index in range(3):
        roles = [choice.delta.role for choice in choices if choice.index == index]
        assert roles == ["assistant"] + [None] * len(says("yes"))


async def test_prompts_may_be_token_ids() -> None:
    backend = answers("x")
    async with client_of(backend) as client:
        await client.completions.create(model="demo", prompt=[7, 8, 9])
        await client.completions.create(model="demo", prompt=[[7], [8, 9]])
    assert [request.prompt for request in backend.requests] == [[7, 8, 9], [7], [8, 9]]


async def test_logprobs_of_completions() -> None:
    script = says("one two")
    texts = [demo_model().token_text(event.token_id) for event in script]
    backend = FakeBackend(lambda _request: script)
    async with client_of(backend) as client:
        answer = await client.completions.create(model="demo", prompt="hello", logprobs=2)
        stream = await client.completions.create(
            model="demo", prompt="hello", logprobs=2, stream=True
        )
        parts = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == texts
    assert logprobs.token_logprobs == [event.logprob for event in script]
    assert logprobs.text_offset == [len("".join(texts[:index])) for index in range(len(texts))]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {
        texts[0]: -1.0, demo_model().token_text(script[0].token_id + 1): -9.0,
    }  # fmt: skip
    assert [part.text_offset for part in parts if part] == [[n] for n in logprobs.text_offset]
    assert backend.requests[0].sampling.logprobs == 2


async def test_logprobs_of_chat() -> None:
    script = says("ü")
    backend = FakeBackend(lambda _request: script)
    async with client_of(backend) as client:
        answer = await client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2
        )
        stream = await client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, stream=True
        )
        parts = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first = logprobs.content[0]
    assert first.token == demo_model().token_text(script[0].token_id)
    assert first.bytes == list(first.token.encode())
    assert [entry.logprob for entry in first.top_logprobs] == [-1.0, -9.0]
    assert [part.content[0].logprob for part in parts if part and part.content] == [
        event.logprob for event in script
    ]
    assert [request.sampling.logprobs for request in backend.requests] == [2, 0]


async def test_stop_strings_end_the_answer() -> None:
    backend = answers("one two three four five")
    async with client_of(backend) as client:
        answer = await client.completions.create(model="demo", prompt="hello", stop=" three")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two", "stop")


async def test_extensions_travel_in_extra_body() -> None:
    backend = answers("x")
    extra = {"top_k": 5, "min_tokens": 3, "ignore_eos": True, "add_special_tokens": False}
    async with client_of(backend) as client:
        await client.completions.create(
            model="demo", prompt="hello", temperature=0, seed=7, extra_body=extra
        )
    sampling = backend.requests[0].sampling
    assert backend.requests[0].prompt == PROMPT[1:]
    assert (sampling.top_k, sampling.min_tokens, sampling.ignore_eos) == (5, 3, True)
    assert (sampling.temperature, sampling.seed) == (0.0, 7)


async def test_special_tokens_show_on_request() -> None:
    script = says("a<|user|>b")
    async with client_of(FakeBackend(lambda _request: script)) as client:
        hidden = await client.completions.create(model="demo", prompt="hello")
        shown = await client.completions.create(
            model="demo", prompt="hello", extra_body={"skip_special_tokens": False}
        )
    assert (hidden.choices[0].text, shown.choices[0].text) == ("ab", "a<|user|>b")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OverloadedError("queue full", retry_after_s=2.5), openai.RateLimitError),
        (UnavailableError("no worker"), openai.InternalServerError),
        (InvalidRequestError("too long", field="prompt"), openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_submit", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    error: Exception, kind: type[openai.APIStatusError], stream: bool, at_submit: bool
) -> None:
    failure = RefusedError(error) if at_submit else error
    async with client_of(FakeBackend(lambda _request: [failure])) as client:
        with pytest.raises(kind) as caught:
            await client.completions.create(model="demo", prompt="hello", stream=stream)
    assert caught.value.body is not None
    retry_after = caught.value.response.headers.get("retry-after")
    assert retry_after == {429: "3", 503: "1", 400: None}[caught.value.status_code]


async def test_a_failure_after_the_first_token_comes_as_an_event() -> None:
    script: Script = [*says("one two three")[:2], UnavailableError("the worker is gone")]
    async with client_of(FakeBackend(lambda _request: script)) as client:
        stream = await client.completions.create(model="demo", prompt="hello", stream=True)
        texts = [(await anext(stream)).choices[0].text for _ in range(2)]
        assert "".join(texts) == "one two"
        with pytest.raises(openai.APIError, match="the worker is gone"):
            await anext(stream)


async def test_models() -> None:
    async with client_of(FakeBackend()) as client:
        (card,) = [model async for model in client.models.list()]
        assert (card.id, card.object) == ("demo", "model")
        assert card.model_dump()["max_model_len"] == 2048
        assert (await client.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other/model")
        with pytest.raises(openai.NotFoundError, match="only 'demo'"):
            await client.completions.create(model="other", prompt="hello")
