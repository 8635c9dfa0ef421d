"""What vLLM's and SGLang's clients may ask for beside OpenAI's fields, over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import httpx
import pytest

from services.gateway.backend import GenerationRequest, Targets
from tests.unit.gateway_fakes import (
    FakeBackend,
    Script,
    demo_model,
    events,
    looked_at,
    running_face,
    says,
)

PROMPT = demo_model().encode("hello you")
MESSAGES = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def client_of(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running_face(backend) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", timeout=20) as client,
    ):
        yield client


async def completion(backend: FakeBackend, **values: Any) -> dict[str, Any]:
    async with client_of(backend) as client:
        body = {"prompt": "hello you", **values}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chat(backend: FakeBackend, **values: Any) -> dict[str, Any]:
    async with client_of(backend) as client:
        body = {"messages": MESSAGES, **values}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chunks(backend: FakeBackend, path: str, **values: Any) -> list[dict[str, Any]]:
    """The events of a stream, but for the last."""
    async with client_of(backend) as client:
        text = (await client.post(path, json={"stream": True, **values})).text
    *parts, done = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def answers(text: str, *, stops: bool = False) -> FakeBackend:
    return FakeBackend(lambda _request: says(text, stops=stops))


def texts(token_ids: list[int]) -> list[str]:
    return [demo_model().token_text(token_id) for token_id in token_ids]


async def test_a_request_reaches_the_dispatcher_with_all_that_it_says() -> None:
    backend = answers("x")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client_of(backend) as client:
        body = {
            "prompt": [7, 8], "logit_bias": {"5": 1.5}, "allowed_token_ids": [5, 6],
            "priority": -3, "cache_salt": "a", "extra_key": "b", "request_id": "mine",
            "ttft_target_ms": 100, "tpot_target_ms": 5,
        }  # fmt: skip
        headers = {"traceparent": trace, "x-session-id": "talk-1"}
        response = await client.post("/v1/completions", json=body, headers=headers)
        assert response.json()["id"] == "cmpl-mine"
        assert response.headers["x-request-id"] == "mine"
        body = {"prompt": [7], "session_id": "talk-2", "rid": "yours"}
        headers = {"traceparent": "nonsense", "x-session-id": "talk-1", "x-request-id": "header"}
        await client.post("/v1/completions", json=body, headers=headers)
    first, second = backend.requests
    assert (first.sampling.logit_bias, first.sampling.allowed_token_ids) == ({5: 1.5}, [5, 6])
    assert (first.priority, first.session_id, first.traceparent) == (-3, "talk-1", trace)
    assert (first.request_id, first.targets) == ("mine", Targets(100, 5))
    assert "a" in first.cache_salt
    assert "b" in first.cache_salt
    assert (second.session_id, second.traceparent) == ("talk-2", "")
    assert (second.request_id, second.cache_salt, second.targets) == ("header", "", Targets())


async def test_bad_words_are_banned_with_and_without_a_blank() -> None:
    backend = answers("x")
    await completion(backend, bad_words=["return", "a b"])
    model = demo_model()
    wanted = [
        model.encode(text, add_special_tokens=False)
        for text in ("return", " return", "a b", " a b")
    ]
    assert backend.requests[0].sampling.bad_words == wanted


async def test_an_echo_comes_before_the_answer() -> None:
    assert (await completion(answers(" yes"), echo=True))["choices"][0]["text"] == "hello you yes"
    answer = await completion(answers(" yes"), echo=True, prompt=PROMPT)
    assert answer["choices"][0]["text"] == "hello you yes"
    parts = await chunks(answers(" yes"), "/v1/completions", prompt="hello you", echo=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == "hello you yes"
    assert parts[0]["choices"][0]["text"] == "hello you"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_echo_with_logprobs_scores_the_prompt(is_stream: bool) -> None:
    backend = FakeBackend(lambda _request: events([40]))
    values: dict[str, Any] = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
    if is_stream:
        found = [
            part["choices"][0]["logprobs"]
            for part in await chunks(backend, "/v1/completions", **values)
        ]
        logprobs = {name: list(chain(*(part[name] for part in found))) for name in found[0]}
    else:
        logprobs = (await completion(backend, **values))["choices"][0]["logprobs"]
    scored = looked_at(backend.requests[0])
    assert logprobs["tokens"] == texts([*PROMPT, 40])
    assert logprobs["token_logprobs"] == [None, *(each.logprob for each in scored), -1.0]
    assert logprobs["top_logprobs"][0] is None
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top, "whoever scores looks for it there"
    own = logprobs["tokens"]
    assert logprobs["text_offset"] == [len("".join(own[:index])) for index in range(len(own))]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_echo_may_be_all(is_stream: bool) -> None:
    backend = FakeBackend(lambda _request: events([1], "stop"))
    values: dict[str, Any] = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
    if is_stream:
        *parts, last = await chunks(
            backend, "/v1/completions", stream_options={"include_usage": True}, **values
        )
        shown = "".join(part["choices"][0]["text"] for part in parts)
        num_scored = sum(len(part["choices"][0]["logprobs"]["tokens"]) for part in parts)
        reason, usage = parts[-1]["choices"][0]["finish_reason"], last["usage"]
    else:
        answer = await completion(backend, **values)
        choice, usage = answer["choices"][0], answer["usage"]
        shown, reason = choice["text"], choice["finish_reason"]
        num_scored = len(choice["logprobs"]["tokens"])
    assert (shown, reason, num_scored) == ("hello you", "length", len(PROMPT))
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, len(PROMPT))
    assert backend.requests[0].sampling.max_tokens == 1


async def test_prompt_logprobs_look_as_vllms() -> None:
    backend = answers("x")
    answer = await completion(backend, prompt_logprobs=1)
    none, *shown = answer["choices"][0]["prompt_logprobs"]
    assert none is None
    for entries, token_id, index in zip(shown, PROMPT[1:], range(1, 99), strict=False):
        model = demo_model()
        assert entries == {
            str(token_id): {
                "logprob": -index, "rank": None, "decoded_token": model.token_text(token_id),
            },
            str(token_id + 1): {
                "logprob": -0.1, "rank": 1, "decoded_token": model.token_text(token_id + 1),
            },
        }  # fmt: skip
    talked = await chat(backend, prompt_logprobs=0)
    assert talked["prompt_logprobs"][0] is None
    assert len(talked["prompt_logprobs"]) == talked["usage"]["prompt_tokens"]
    assert all(len(entries) == 1 for entries in talked["prompt_logprobs"][1:])


async def test_token_ids_come_with_the_answer() -> None:
    said = [event.token_id for event in says("one two")]
    choice = (await completion(answers("one two"), return_token_ids=True))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, said)
    talked = await chat(answers("one two"), return_token_ids=True)
    asked = talked["prompt_token_ids"]
    assert len(asked) == talked["usage"]["prompt_tokens"]
    assert talked["choices"][0]["token_ids"] == said
    ask = {"prompt": PROMPT, "return_token_ids": True}
    parts = [part["choices"][0] for part in await chunks(answers("one two"), "/v1/completions",
                                                         **ask)]  # fmt: skip
    assert [part["token_ids"] for part in parts] == [[token_id] for token_id in said]
    assert [part.get("prompt_token_ids") for part in parts] == [PROMPT, *[None] * (len(said) - 1)]
    begin, *rest = await chunks(
        answers("one two"), "/v1/chat/completions", messages=MESSAGES, return_token_ids=True
    )
    assert begin["prompt_token_ids"] == asked
    assert all("prompt_token_ids" not in part for part in rest)
    assert [part["choices"][0]["token_ids"] for part in rest] == [[each] for each in said]


async def test_tokens_may_be_called_by_their_ids() -> None:
    said = says("one")
    by_id = {"return_tokens_as_token_ids": True}
    answer = await completion(answers("one"), logprobs=1, **by_id)
    names = [f"token_id:{event.token_id}" for event in said]
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == names
    assert set(logprobs["top_logprobs"][0]) == {names[0], f"token_id:{said[0].token_id + 1}"}
    talked = await chat(answers("one"), logprobs=True, top_logprobs=1, **by_id)
    assert [each["token"] for each in talked["choices"][0]["logprobs"]["content"]] == names


async def test_what_ends_an_answer_is_shown_on_request() -> None:
    words = "one two three four"
    whole = await completion(answers(words), stop=[" three"], include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == "one two three"
    assert whole["choices"][0]["finish_reason"] == "stop"
    ask = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    ended = await completion(answers("one", stops=True), **ask)
    assert ended["choices"][0]["text"] == "one" + demo_model().token_text(1)
    assert (await completion(answers("one", stops=True)))["choices"][0]["text"] == "one"


async def test_the_best_of_some_are_shown_and_all_are_counted() -> None:
    def script(request: GenerationRequest) -> Script:
        said = says(["worse", "best", "worst"][request.choice])
        return [
            type(each)(each.index, each.token_id, [-2.0, -1.0, -3.0][request.choice], (),
                       each.finish_reason)
            for each in said
        ]  # fmt: skip

    answer = await completion(FakeBackend(script), n=2, best_of=3)
    assert [choice["text"] for choice in answer["choices"]] == ["best", "worse"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    num_output = sum(len(says(text)) for text in ("worse", "best", "worst"))
    assert answer["usage"]["completion_tokens"] == num_output


async def test_prompts_are_cut_to_their_ends() -> None:
    backend = answers("x")
    await completion(backend, truncate_prompt_tokens=2)
    await completion(backend, truncate_prompt_tokens=-1, prompt="hello " * 100_000, max_tokens=8)
    await chat(backend, truncate_prompt_tokens=3)
    cut, fitted, talked = (request.prompt for request in backend.requests)
    assert cut == PROMPT[-2:]
    assert len(fitted) == 2048 - 8
    assert len(talked) == 3


async def test_a_stream_may_have_fewer_and_longer_chunks() -> None:
    ask = {"prompt": PROMPT, "stream_interval": 3}
    said = [event.token_id for event in says("one two three four five six")]
    parts = await chunks(
        answers("one two three four five six"), "/v1/completions", return_token_ids=True, **ask
    )
    shown = [part["choices"][0]["token_ids"] for part in parts]
    assert list(chain(*shown)) == said
    assert [len(each) for each in shown[:-1]] == [1, *[3] * (len(shown) - 2)]
    assert 1 <= len(shown[-1]) <= 3


async def test_the_usage_comes_with_times_that_benchmarks_read() -> None:
    backend = FakeBackend()
    ask = {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
    async with client_of(backend) as client:
        task = asyncio.create_task(client.post("/v1/completions", json=ask))
        await backend.submitted()
        times = backend.streams[0].timeline
        times.received_at, times.placed_at, times.prefilled_at = 10.0, 10.5, 11.0
        times.first_token_at, times.handed_over_at = 11.25, 11.5
        backend.streams[0].feed(says("x"))
        lines = (await task).text.strip().split("\n\n")[:-1]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["choices"] == []
    assert last["metrics"] == {
        "queue_time_ms": 500.0, "time_to_first_token_ms": 1250.0, "kv_transfer_ms": 500.0,
    }  # fmt: skip
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert "metrics" not in json.loads(lines[0].removeprefix("data: "))


async def test_an_answer_may_go_on_from_its_own_beginning() -> None:
    backend = answers(" world")
    begun = [*MESSAGES, {"role": "assistant", "content": "hello"}]
    ask: dict[str, Any] = {"messages": begun, "continue_final_message": True}
    answer = await chat(backend, echo=True, **ask)
    assert answer["choices"][0]["message"]["content"] == "hello world"
    answer = await chat(backend, **ask)
    assert answer["choices"][0]["message"]["content"] == " world"
    role, *_ = await chunks(backend, "/v1/chat/completions", echo=True, **ask)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": "hello"}
    for request in backend.requests:
        assert demo_model().decode(request.prompt).endswith("hello")
    await chat(backend)
    await chat(backend, add_generation_prompt=False)
    asked, silent = (request.prompt for request in backend.requests[-2:])
    assert asked[: len(silent)] == silent
    assert len(asked) > len(silent)


async def test_a_message_without_text_cannot_be_gone_on_from() -> None:
    for content in (None, "", "  "):
        begun = [*MESSAGES, {"role": "assistant", "content": content}]
        async with client_of(FakeBackend()) as client:
            ask = {"messages": begun, "continue_final_message": True}
            response = await client.post("/v1/chat/completions", json=ask)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "continue_final_message"
