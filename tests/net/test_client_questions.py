"""Scores, tokens, texts, models and counts over the msgpack face, and from both clients."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvbaton import AsyncClient, Client
from kvbaton.asking import ScoredText
from kvbaton.errors import (
    ConnectionLostError,
    InvalidRequestError,
    KvbatonError,
    NotFoundError,
    TooLargeError,
    UnprocessableError,
)
from kvbaton.protocol import Error
from kvbaton.questions import (
    MAX_SCORED,
    ModelCard,
    Score,
)
from services.gateway.clients import face as clients
from tests.net.gateways import (
    raw_client,
    running_face,
)
from tests.unit.gateway_fakes import FakeBackend, demo_model, events

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "measure"}}


def scoring() -> FakeBackend:
    return FakeBackend(lambda _: events([5]))


def logprobs(score: ScoredText) -> list[float | None]:
    return [token.logprob for token in score.tokens]


async def test_texts_are_scored_token_by_token() -> None:
    backend = scoring()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        scores = await client.score(["one two three", "four"], top_logprobs=1, priority=2)
    assert [[token.token_id for token in score.tokens] for score in scores] == [
        demo_model().encode(text) for text in ("one two three", "four")
    ]
    assert "".join(token.text for token in scores[0].tokens) == "one two three"
    num_tokens = len(scores[0].tokens)
    assert logprobs(scores[0]) == [None, *(-float(index) for index in range(1, num_tokens))]
    assert scores[0].logprob == -sum(range(num_tokens))
    second = scores[0].tokens[1]
    assert second.top_logprobs == [(second.token_id + 1, -0.1)]
    assert [request.sampling.max_tokens for request in backend.requests] == [1, 1]
    assert {request.sampling.prompt_logprobs for request in backend.requests} == {1}
    assert {request.priority for request in backend.requests} == {2}


async def test_token_ids_are_scored_as_they_are() -> None:
    async with running_face(scoring()) as face, AsyncClient(face.endpoint) as client:
        scores = await client.score(token_ids=[[5, 6, 7], [8]])
        ((only,), (bare,)) = [
            await client.score(token_ids=[[5]]),
            await client.score(["x"], add_special_tokens=False),
        ]
    assert [logprobs(score) for score in scores] == [[None, -1.0, -2.0], [None]]
    assert (only.logprob, only.tokens[0].token_id) == (0, 5)
    assert bare.tokens[0].token_id == demo_model().encode("x", add_special_tokens=False)[0]


async def test_scores_of_long_texts_come_in_several_messages() -> None:
    async with running_face(scoring()) as face, AsyncClient(face.endpoint) as client:
        (score,) = await client.score(token_ids=[[5] * 1500])
    assert [token.index for token in score.tokens] == list(range(1500))


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "texts", "exactly one of texts and token_ids"),
        ({"texts": ["x"], "token_ids": [[5]]}, "token_ids", "exactly one of"),
        ({"texts": []}, "texts", "1 to 128 texts, got 0"),
        ({"token_ids": [[5]] * (MAX_SCORED + 1)}, "token_ids", "got 129"),
        ({"token_ids": [[5], []]}, "token_ids", "token_ids is empty"),
        ({"token_ids": [[5], [-1]]}, "token_ids", "token id -1"),
        ({"token_ids": [[5] * 2048]}, "token_ids", "context of 2048"),
        ({"texts": ["x"], "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"texts": ["x"], "deadline_ms": 0}, "deadline_ms", "at least 1"),
        ({"texts": ["x"], "priority": 2**31}, "priority", "at most 2147483647"),
        ({"texts": ["x"], "cache_salt": ""}, "cache_salt", "1 to 256"),
        ({"texts": ["x"], "model": "other"}, "model", "only 'demo'"),
    ],
)
async def test_a_bad_score_is_refused_by_field(
    fields: dict[str, Any], field: str, words: str
) -> None:
    backend = scoring()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        error = await client.ask(Score(id=5, **fields))
        assert isinstance(error, Error)
        assert (error.id, error.field) == (5, field)
        assert words in error.message
        assert backend.requests == []


async def test_a_worker_that_gives_no_scores_is_an_error() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        asking = asyncio.ensure_future(client.score(["one two"]))
        await backend.submitted()
        backend.streams[0].prompt_logprobs = []
        backend.streams[0].feed(events([5]))
        with pytest.raises(KvbatonError, match="no log probabilities"):
            await asking


async def test_a_score_that_is_given_up_holds_nothing() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        asking = asyncio.ensure_future(client.score(["one", "two"]))
        await backend.submitted(2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for stream in backend.streams:
            await stream.cancelled.wait()


async def test_a_text_becomes_the_tokens_of_a_prompt_and_a_text_again() -> None:
    text = "Grüße 🎉"
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        told = await client.tokenize(text, return_token_strs=True)
        bare = await client.tokenize(text, add_special_tokens=False)
        assert await client.detokenize(told.token_ids, skip_special_tokens=True) == text
        assert await client.detokenize(bare.token_ids) == text
        assert await client.detokenize([]) == ""
    assert told.token_ids == demo_model().encode(text)
    assert told.token_strs == [demo_model().token_name(each) for each in told.token_ids]
    assert told.max_model_len == 2048
    assert (bare.token_ids, bare.token_strs) == (told.token_ids[1:], [])


async def test_an_answer_that_no_client_would_take_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "MAX_MESSAGE_BYTES", 1000)
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(TooLargeError, match="a message has at most 1000"):
            await client.tokenize("one " * 500)
        assert (await client.tokenize("one")).token_ids


async def test_a_conversation_becomes_the_tokens_of_a_prompt() -> None:
    backend = FakeBackend(lambda _: events([5]))
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        told = await client.tokenize(messages=[HELLO], tools=[TOOL])
        await client.generate(messages=[HELLO], tools=[TOOL]).finish()
        shorter = await client.tokenize(messages=[HELLO], add_generation_prompt=False)
    assert told.token_ids == backend.requests[0].prompt
    assert len(shorter.token_ids) < len(told.token_ids)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "text"),
        ({"text": "x", "messages": [HELLO]}, "messages"),
        ({"messages": []}, "messages"),
        ({"text": "x" * 10**6}, "text"),
    ],
)
async def test_a_bad_tokenize_is_refused_by_field(options: dict[str, Any], field: str) -> None:
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.tokenize(**options)
        assert caught.value.field == field


async def test_tokens_that_the_model_does_not_have_have_no_text() -> None:
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        for ids in ([-1], [10**6], [5] * (1024 * 1024 + 1)):
            with pytest.raises(InvalidRequestError) as caught:
                await client.detokenize(ids)
            assert caught.value.field == "token_ids"
        with pytest.raises(NotFoundError):
            await client.detokenize([5], model="other")
        with pytest.raises(UnprocessableError):
            await client.detokenize(["x"])  # type: ignore[list-item]


async def test_models_and_counts_are_told() -> None:
    async with running_face(FakeBackend()) as face, AsyncClient(face.endpoint) as client:
        assert await client.models() == [ModelCard(id="demo", vocab_size=2048, max_model_len=2048)]
        assert await client.stats() == {"fake_requests": 0.0}


def test_the_client_for_threads_asks_the_same() -> None:
    async def face_and_client() -> None:
        async with running_face(scoring()) as face:
            await asyncio.to_thread(ask_all, face.endpoint)

    def ask_all(endpoint: str) -> None:
        with Client(endpoint) as client:
            told = client.tokenize("one two", return_token_strs=True)
            assert client.detokenize(told.token_ids, skip_special_tokens=True) == "one two"
            (score,) = client.score(["one two"])
            assert [token.token_id for token in score.tokens] == told.token_ids
            assert [model.id for model in client.models()] == ["demo"]
            assert client.stats() == {"fake_requests": 1.0}
            with pytest.raises(InvalidRequestError):
                client.tokenize()
        for ask in (client.models, client.stats, lambda: client.score(["x"])):
            with pytest.raises(ConnectionLostError, match="the client was closed"):
                ask()

    asyncio.run(face_and_client())
