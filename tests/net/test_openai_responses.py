"""OpenAI's own package with the Responses API, as its users call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError

from kvbaton.errors import UnavailableError
from tests.net.openai_talk import CALLS, FLAT, PARIS, ROME, City, Talk, asking, talking
from tests.unit.gateway_fakes import FakeBackend, running_face, says


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    async with talking() as talk:
        yield talk


@pytest.fixture
async def client(talk: Talk) -> AsyncIterator[AsyncOpenAI]:
    async with asking(talk.face) as client:
        yield client


async def test_a_response(talk: Talk, client: AsyncOpenAI) -> None:
    talk.backend.num_cached_tokens = 4
    answer = await client.responses.create(
        model="demo", input="Hi", instructions="Be kind.", max_output_tokens=50, temperature=0.5
    )
    assert answer.output_text == "Hello"
    assert (answer.status, answer.instructions) == ("completed", "Be kind.")
    assert answer.model_dump()["store"] is False
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert talk.prompt == "<|bos|><|system|>Be kind.<|user|>Hi<|assistant|>"
    assert (talk.last.sampling.max_tokens, talk.last.sampling.temperature) == (50, 0.5)


async def test_a_response_goes_on_from_earlier_items(talk: Talk, client: AsyncOpenAI) -> None:
    items: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": PARIS},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": ROME},
        {"type": "function_call_output", "call_id": "c1", "output": "21"},
    ]
    await client.responses.create(model="demo", input=items)
    calls = "".join(
        f'<tool_call>{{"name": "get_weather", "arguments": {each}}}</tool_call>'
        for each in (PARIS, ROME)
    )
    assert talk.prompt == (
        f"<|bos|><|system|>Be kind.<|user|>Hi<|assistant|>{calls}<|eos|>"
        "<|user|><tool_response>21</tool_response><|assistant|>"
    )


async def test_a_response_s_events_tell_its_items_in_order(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = CALLS
    stream = await client.responses.create(model="demo", input="Hi", tools=[FLAT], stream=True)
    events: list[Any] = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    runs = [kind for index, kind in enumerate(kinds) if kinds[index - 1] != kind]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
            "output_item.done"]  # fmt: skip
    assert runs == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        *call, *call,
        "completed",
    ]  # fmt: skip
    output = events[-1].response.output
    assert [item.type for item in output] == ["message", "function_call", "function_call"]
    assert [item.arguments for item in output[1:]] == [PARIS, ROME]
    whole = await client.responses.create(model="demo", input="Hi", tools=[FLAT])
    assert [item.type for item in whole.output] == [item.type for item in output]


async def test_a_response_may_be_forced_and_formed(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = PARIS
    named: Any = {"type": "function", "name": "get_weather"}
    answer = await client.responses.create(
        model="demo", input="Hi", tools=[FLAT], tool_choice=named
    )
    assert answer.output[0].type == "function_call"
    talk.text = '{"name":"Paris","population":1}'
    formed = await client.responses.parse(model="demo", input="Hi", text_format=City)
    assert formed.output_parsed == City(name="Paris", population=1)


async def test_a_response_cut_off_is_incomplete(talk: Talk, client: AsyncOpenAI) -> None:
    talk.ending = False
    answer = await client.responses.create(model="demo", input="Hi")
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    stream = await client.responses.create(model="demo", input="Hi", stream=True)
    assert [event.type async for event in stream][-1] == "response.incomplete"


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_response_that_fails_says_so(is_late: bool) -> None:
    error = UnavailableError("no worker is left")
    script = [*(says("Hel")[:1] if is_late else ()), error]
    async with (
        running_face(FakeBackend(lambda _request: script)) as face,
        asking(face) as client,
    ):
        if not is_late:
            with pytest.raises(InternalServerError, match="no worker is left"):
                await client.responses.create(model="demo", input="Hi", stream=True)
            return
        stream = await client.responses.create(model="demo", input="Hi", stream=True)
        events: list[Any] = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "no worker is left"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}},
         "text.format.schema"),
    ],
)  # fmt: skip
async def test_what_a_response_cannot_be_is_refused_by_field(
    fields: Any, field: str, client: AsyncOpenAI
) -> None:
    with pytest.raises(BadRequestError) as error:
        await client.responses.create(**{"model": "demo", "input": "Hi", **fields})
    assert error.value.param == field
