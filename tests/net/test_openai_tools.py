"""OpenAI's own package with tools and structured output, as its users call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.net.openai_talk import (
    CALLS,
    FORCED,
    HELLO,
    PARIS,
    ROME,
    WEATHER,
    City,
    Talk,
    asking,
    talking,
)


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    async with talking() as talk:
        yield talk


@pytest.fixture
async def client(talk: Talk) -> AsyncIterator[AsyncOpenAI]:
    async with asking(talk.face) as client:
        yield client


def arguments_of(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]


async def test_the_model_may_call_several_tools(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = CALLS
    answer = await client.chat.completions.create(model="demo", messages=HELLO, tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    assert arguments_of(choice) == [("get_weather", PARIS), ("get_weather", ROME)]
    assert len({call.id for call in choice.message.tool_calls or ()}) == 2
    assert '"get_weather"' in talk.prompt
    assert talk.last.sampling.grammar == ""


async def test_calls_are_streamed_piece_by_piece(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = CALLS
    stream = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], stream=True
    )
    chunks: list[ChatCompletionChunk] = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see. "
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    firsts = [piece for piece in pieces if piece.id]
    assert [(piece.index, piece.type) for piece in firsts] == [(0, "function"), (1, "function")]
    assert [piece.function and piece.function.name for piece in firsts] == ["get_weather"] * 2
    for index, arguments in enumerate((PARIS, ROME)):
        texts = [piece.function and piece.function.arguments for piece in pieces
                 if piece.index == index]  # fmt: skip
        assert len(texts) > 3
        assert "".join(text or "" for text in texts) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_openai_s_own_helper_puts_a_stream_together(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = CALLS
    tool: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    async with client.chat.completions.stream(model="demo", messages=HELLO, tools=[tool]) as stream:
        answer = await stream.get_final_completion()
    assert arguments_of(answer.choices[0]) == [("get_weather", PARIS), ("get_weather", ROME)]


async def test_with_none_no_tool_is_called(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = CALLS
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.content == CALLS
    assert answer.choices[0].message.tool_calls is None
    assert "get_weather" not in talk.prompt


async def test_required_forces_a_call(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = FORCED
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice="required"
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert arguments_of(answer.choices[0]) == [("get_weather", PARIS)]
    assert "call_0" in talk.last.sampling.grammar


async def test_a_named_tool_is_called(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = PARIS
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice=choice
    )
    assert answer.choices[0].finish_reason == "stop"
    assert arguments_of(answer.choices[0]) == [("get_weather", PARIS)]
    assert '"city"' in talk.last.sampling.grammar


async def test_a_call_cut_off_says_length(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text, talk.ending = FORCED[:-8], False
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice="required"
    )
    assert answer.choices[0].finish_reason == "length"
    ((_, arguments),) = arguments_of(answer.choices[0])
    assert PARIS.startswith(arguments)


async def test_what_a_tool_gave_reaches_the_model(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = FORCED
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice="required"
    )
    message = answer.choices[0].message
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21"}
    turns: Any = [*HELLO, message, result]
    await client.chat.completions.create(model="demo", messages=turns, tools=[WEATHER])
    call = f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
    assert call in talk.prompt
    assert "<tool_response>21</tool_response>" in talk.prompt


async def test_pydantic_models_come_back_parsed(talk: Talk, client: AsyncOpenAI) -> None:
    talk.text = '{"name":"Paris","population":2102650}'
    answer = await client.chat.completions.parse(model="demo", messages=HELLO, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris", population=2102650)
    grammar = json.loads(talk.last.sampling.grammar)["grammars"][0]["json_schema"]
    assert grammar["properties"].keys() == {"name", "population"}


@pytest.mark.parametrize(
    "extra", [{"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}]
)
async def test_completions_take_vllm_s_fields(
    extra: dict[str, Any], talk: Talk, client: AsyncOpenAI
) -> None:
    await client.completions.create(model="demo", prompt="Is it warm?", extra_body=extra)
    assert talk.last.sampling.grammar == 'start: "yes" | "no"'


async def test_the_blocking_client_does_the_same(talk: Talk) -> None:
    talk.text = CALLS

    def ask() -> list[tuple[str, str]]:
        url = f"http://127.0.0.1:{talk.face.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model="demo", messages=HELLO, tools=[WEATHER])
            return arguments_of(answer.choices[0])

    assert await asyncio.to_thread(ask) == [("get_weather", PARIS), ("get_weather", ROME)]


async def test_a_wrong_schema_is_refused_by_field(client: AsyncOpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}
    with pytest.raises(BadRequestError) as error:
        await client.chat.completions.create(model="demo", messages=HELLO, response_format=schema)
    assert error.value.param == "response_format.json_schema.schema"
