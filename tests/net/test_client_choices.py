"""Several choices of one request: told apart, ranked, gone on with at another gateway."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton import AsyncClient, AsyncGeneration
from kvbaton.errors import InvalidRequestError, KvbatonError, ProtocolError
from kvbaton.protocol import (
    Accepted,
    Done,
    Generate,
    Resume,
    Resumed,
    Timings,
    Token,
    Tokens,
    Usage,
)
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, TokenEvent
from tests.net.gateways import raw_client, running_face, scripted_gateway
from tests.net.test_resume import crash, rest, two_faces
from tests.unit.gateway_fakes import FakeBackend, RefusedError, says

TEXTS = ["one 🦊 two", "three four five six", "seven"]


def answers(*num_tokens: int) -> FakeBackend:
    """Each choice has a text of its own. The first requests stall after so many tokens in all."""
    stalls = iter(num_tokens)

    def script(request: GenerationRequest) -> list[TokenEvent]:
        return says(TEXTS[request.choice])[len(request.resumed) : next(stalls, None)]

    return FakeBackend(script)


def outputs(stream: AsyncGeneration) -> list[tuple[str, str | None]]:
    return [(choice.text, choice.finish_reason) for choice in stream.choices]


async def test_each_choice_has_its_own_text_and_end() -> None:
    backend = answers()
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x", n=3, seed=5)
        tokens = await rest(stream)
    assert outputs(stream) == [(text, "length") for text in TEXTS]
    for number in range(3):
        mine = [token.index for token in tokens if token.choice == number]
        assert mine == list(range(len(says(TEXTS[number]))))
    assert (stream.text, stream.finish_reason) == (TEXTS[0], "length")
    assert stream.usage is not None
    assert stream.usage.num_output_tokens == len(tokens)
    assert [request.sampling.seed for request in backend.requests] == [5, 5, 5]
    assert [(request.choice, request.n) for request in backend.requests] == [(0, 3), (1, 3), (2, 3)]


async def test_the_others_are_submitted_with_the_first_token_of_the_first() -> None:
    backend = FakeBackend(lambda request: says(TEXTS[request.choice]) if request.choice else [])
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = client.generate("x", n=3)
        await backend.submitted()
        assert len(backend.requests) == 1
        backend.streams[0].feed(says(TEXTS[0]))
        await rest(stream)
    assert len(backend.requests) == 3


async def test_the_best_are_sent_likeliest_first() -> None:
    backend = answers()

    def script(request: GenerationRequest) -> list[TokenEvent]:
        logprob = [-2.0, -1.0, -3.0][request.choice]
        return [
            TokenEvent(event.index, event.token_id, logprob, finish_reason=event.finish_reason)
            for event in says(TEXTS[request.choice])
        ]

    backend.script = script
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        stream = await client.generate("x", n=2, best_of=3).finish()
    assert [text for text, _ in outputs(stream)] == [TEXTS[1], TEXTS[0]]
    assert stream.usage is not None
    assert stream.usage.num_output_tokens == sum(len(says(text)) for text in TEXTS)
    assert {request.sampling.logprobs for request in backend.requests} == {0}


async def test_a_failure_of_one_choice_ends_the_request_and_cancels_the_others() -> None:
    def script(request: GenerationRequest) -> list[TokenEvent | Exception]:
        if request.choice == 1:
            return [KvbatonError("broken")]
        return [TokenEvent(0, 5)]

    backend = FakeBackend(script)
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(KvbatonError, match="broken"):
            await rest(client.generate("x", n=3))
        for stream in backend.streams:
            await stream.cancelled.wait()


async def test_what_cannot_be_submitted_later_ends_the_request() -> None:
    refused = RefusedError(KvbatonError("no more"))
    backend = FakeBackend(lambda request: [refused] if request.choice else [TokenEvent(0, 5)])
    async with running_face(backend) as face, AsyncClient(face.endpoint) as client:
        with pytest.raises(KvbatonError, match="no more"):
            await rest(client.generate("x", n=2))
        await backend.streams[0].cancelled.wait()


@pytest.mark.parametrize("stalls", [(0,), (2, 0, 0), (3, 5, 0), (99, 4, 1), (99, 99, 1)])
async def test_choices_go_on_at_another_gateway(stalls: tuple[int, ...]) -> None:
    backend = answers(*stalls)
    num_before = sum(min(num, len(says(text))) for num, text in zip(stalls, TEXTS, strict=False))
    async with two_faces(backend) as (client, faces):
        stream = client.generate("x", n=3)
        await backend.submitted(len(stalls))
        tokens = [await anext(stream) for _ in range(num_before)]
        crash(faces)
        tokens += await rest(stream)
    assert outputs(stream) == [(text, "length") for text in TEXTS]
    keys = [(token.choice, token.index) for token in tokens]
    assert len(set(keys)) == len(keys) == sum(len(says(text)) for text in TEXTS)
    assert len({request.request_id for request in backend.requests}) == 3
    assert len({request.sampling.seed for request in backend.requests}) == 1


async def test_the_next_gateway_is_told_of_each_choice() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x", n=2)
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Accepted(id=1, request_id="a" * 32, seed=7))
        gateway.send(
            Tokens(id=1, tokens=[Token(index=0, token_id=5, choice=1)], finish_reason="stop")
        )
        await anext(stream)
    async with scripted_gateway(gateway.endpoint) as again:
        await again.welcome("instance-2")
        message = await again.receive()
        assert isinstance(message, Generate)
        assert message.resume == Resume(
            request_id="a" * 32,
            seed=7,
            choices=[Resumed(), Resumed(tokens=[5], finish_reason="stop")],
        )
        await client.close()


@pytest.mark.parametrize("choices", [[2], [0, 1]])
async def test_tokens_of_a_choice_that_is_not_due_are_not_believed(choices: list[int]) -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x", n=2)
        await gateway.welcome()
        await gateway.receive()
        tokens = [Token(index=index, token_id=5, choice=each) for index, each in enumerate(choices)]
        gateway.send(Tokens(id=1, tokens=tokens))
        with pytest.raises(ProtocolError, match="a choice that was not asked for"):
            await rest(stream)
        await client.close()


async def test_a_gateway_that_knows_no_choices_is_found_out() -> None:
    """One of a former version answers with one choice."""
    usage = Usage(num_prompt_tokens=1, num_output_tokens=1, num_cached_tokens=0)
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        stream = client.generate("x", n=2)
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Done(id=1, finish_reason="stop", usage=usage, timings=Timings()))
        with pytest.raises(ProtocolError, match="former version"):
            await rest(stream)
        await client.close()


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"n": 0}, "n", "at least 1"),
        ({"n": 129}, "n", "at most 128"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"n": 2, "best_of": 129}, "best_of", "at most 128"),
        (
            {"n": 2, "resume": Resume(request_id="a" * 32, seed=1, tokens=[5])},
            "resume.tokens",
            "one choice, not 2",
        ),
        (
            {"n": 2, "resume": Resume(request_id="a" * 32, seed=1, choices=[Resumed()])},
            "resume.choices",
            "each of the 2",
        ),
        (
            {
                "n": 2,
                "resume": Resume(
                    request_id="a" * 32, seed=1, choices=[Resumed(), Resumed(tokens=[-1])]
                ),
            },
            "resume.choices[1].tokens",
            "token id -1",
        ),
    ],
)
async def test_choices_are_refused_by_field(fields: dict[str, Any], field: str, words: str) -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Generate(id=1, text="x", sampling=SamplingParams(max_tokens=5), **fields))
        _, error = await client.answers()
        assert getattr(error, "field", None) == field
        assert words in getattr(error, "message", "")
        assert backend.requests == []


async def test_one_choice_is_as_ever() -> None:
    async with running_face(answers()) as face, AsyncClient(face.endpoint) as client:
        stream = await client.generate("x", n=1).finish()
        with pytest.raises(InvalidRequestError):
            await client.generate("x", n=0).finish()
        with pytest.raises(InvalidRequestError):
            await client.generate("x", n=10**12).finish()
    assert outputs(stream) == [(TEXTS[0], "length")]
