"""Requests to the msgpack face: what a client asks, what the backend gets, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.conversation import ChatMessage
from kvbaton.errors import OverloadedError, UnavailableError
from kvbaton.protocol import (
    MAX_STOP_STRINGS,
    Done,
    Error,
    Generate,
    Ping,
    Pong,
    Usage,
)
from kvbaton.sampling import SamplingParams
from services.gateway.backend import TokenEvent
from tests.net.gateways import raw_client, running_face
from tests.unit.gateway_fakes import FakeBackend, RefusedError, demo_model, events, says


async def test_a_request_is_answered_token_by_token_then_done() -> None:
    backend = FakeBackend(lambda _: says("Grüße 🎉", stops=True))
    backend.num_cached_tokens = 1
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=5, text="def f("))
        tokens, end = await client.answers()
    assert "".join(token.text for token in tokens) == "Grüße 🎉"
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert all(token.logprob is None and token.top_logprobs == [] for token in tokens)
    assert isinstance(end, Done)
    assert end.finish_reason == "stop"
    num_prompt = len(demo_model().encode("def f("))
    assert end.usage == Usage(
        num_prompt_tokens=num_prompt, num_output_tokens=len(tokens), num_cached_tokens=1
    )


async def test_the_backend_gets_what_the_client_asked_for_and_a_seed() -> None:
    backend = FakeBackend(lambda _: events([5]))
    sampling = SamplingParams(max_tokens=7, top_k=3)
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        for request_id, seed in ((1, None), (2, 99)):
            asked = SamplingParams(max_tokens=7, top_k=3, seed=seed)
            client.send(
                Generate(
                    id=request_id,
                    token_ids=[4, 5],
                    model="demo",
                    sampling=asked,
                    deadline_ms=1500,
                )
            )
            await client.answers()
    assert [request.prompt for request in backend.requests] == [[4, 5], [4, 5]]
    assert [request.sampling.seed for request in backend.requests] == [1, 99]
    assert backend.requests[0].sampling.max_tokens == sampling.max_tokens
    assert backend.requests[0].sampling.top_k == sampling.top_k
    assert backend.requests[0].deadline_s == 1.5
    assert len({request.request_id for request in backend.requests}) == 2


async def test_messages_go_through_the_chat_template() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, messages=[ChatMessage(role="user", content="hello")]))
        await client.answers()
    expected = await demo_model().chat([{"role": "user", "content": "hello"}])
    assert backend.requests[0].prompt == expected


async def test_logprobs_are_sent_when_asked_for() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x", sampling=SamplingParams(logprobs=2)))
        ((token,), _) = await client.answers()
    assert token.logprob == -1.0
    assert token.top_logprobs == [(5, -1.0), (6, -9.0)]


async def test_a_stop_string_ends_the_text_and_cancels_the_rest() -> None:
    backend = FakeBackend(lambda _: says("one two three"))
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x", stop=[" two"]))
        tokens, end = await client.answers()
    assert "".join(token.text for token in tokens) == "one"
    assert isinstance(end, Done)
    assert end.finish_reason == "stop"
    assert backend.streams[0].cancelled.is_set()


async def test_timings_count_in_milliseconds_from_when_the_request_came() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        await backend.submitted()
        timeline = backend.streams[0].timeline
        timeline.received_at, timeline.placed_at, timeline.prefilled_at = 100.0, 100.001, 100.02
        timeline.first_token_at, timeline.finished_at = 100.02, 100.5
        timeline.decode_worker, timeline.num_attempts = "decode.1", 2
        backend.streams[0].feed(events([5]))
        _, end = await client.answers()
    assert isinstance(end, Done)
    assert (end.timings.placed_ms, end.timings.prefilled_ms) == (1.0, 20.0)
    assert (end.timings.first_token_ms, end.timings.finished_ms) == (20.0, 500.0)
    assert end.timings.handed_over_ms == 0.0
    assert (end.timings.decode_worker, end.timings.num_attempts) == ("decode.1", 2)


REFUSALS: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "invalid_request", "text", "exactly one of text, token_ids and messages is given"),
    ({"text": "x", "token_ids": [1]}, "invalid_request", "token_ids", "exactly one of"),
    ({"token_ids": []}, "invalid_request", "token_ids", "token_ids is empty"),
    ({"token_ids": [1, -1]}, "invalid_request", "token_ids", "token id -1"),
    ({"token_ids": [10**9]}, "invalid_request", "token_ids", "token id 1000000000"),
    ({"token_ids": [1] * 2048}, "invalid_request", "token_ids", "context of 2048 tokens"),
    ({"messages": []}, "invalid_request", "messages", "messages is empty"),
    ({"text": "x", "model": "other"}, "not_found", "model", "no model 'other' here, only 'demo'"),
    ({"text": "x", "stop": [""]}, "invalid_request", "stop", "1 to 1024 characters, got 0"),
    ({"text": "x", "stop": ["y" * 1025]}, "invalid_request", "stop", "got 1025"),
    (
        {"text": "x", "stop": ["y"] * (MAX_STOP_STRINGS + 1)},
        "invalid_request",
        "stop",
        "at most 16 strings, got 17",
    ),
    ({"text": "x", "deadline_ms": 0}, "invalid_request", "deadline_ms", "at least 1"),
    ({"text": "x", "deadline_ms": 2**31}, "invalid_request", "deadline_ms", "at most 2147483647"),
    (
        {"text": "x", "sampling": SamplingParams(top_p=float("nan"))},
        "invalid_request",
        "top_p",
        "above 0 and at most 1, got nan",
    ),
    (
        {"text": "x", "sampling": SamplingParams(stop_token_ids=[-1])},
        "invalid_request",
        "stop_token_ids",
        "token id -1",
    ),
]


@pytest.mark.parametrize(("fields", "code", "field", "words"), REFUSALS)
async def test_a_bad_request_is_refused_by_field_and_limit(
    fields: dict[str, Any], code: str, field: str, words: str
) -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        error = await client.ask(Generate(id=5, **fields))
        assert isinstance(error, Error)
        assert (error.id, error.code, error.field) == (5, code, field)
        assert words in error.message
        assert backend.requests == []
        assert isinstance(await client.ask(Ping()), Pong)


async def test_a_refusal_by_the_backend_reaches_the_client() -> None:
    refusal = RefusedError(UnavailableError("no decode worker", retry_after_s=2.0))
    async with (
        running_face(FakeBackend(lambda _: [refusal])) as face,
        raw_client(face.endpoint) as client,
    ):
        await client.hello()
        assert await client.ask(Generate(id=1, text="x")) == Error(
            id=1, code="unavailable", message="no decode worker", retry_after_s=2.0
        )


async def test_a_failure_amid_the_tokens_reaches_the_client() -> None:
    script: list[TokenEvent | Exception] = [TokenEvent(0, 5), OverloadedError("too much")]
    backend = FakeBackend(lambda _: script)
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x"))
        tokens, end = await client.answers()
    assert len(tokens) == 1
    assert end == Error(id=1, code="overloaded", message="too much")


async def test_a_defect_fails_one_request_and_nothing_else() -> None:
    backend = FakeBackend(lambda request: [ValueError("bug")] if request.prompt == [3] else [])
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        error = await client.ask(Generate(id=1, token_ids=[3]))
        assert error == Error(id=1, code="internal_error", message="internal error")
        assert isinstance(await client.ask(Ping()), Pong)
