"""Questions of a client that are asked again, given up or answered wrongly."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton import AsyncClient
from kvbaton.errors import (
    CancelledRequestError,
    DeadlineError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from kvbaton.protocol import Cancel, Error
from kvbaton.questions import Counted, Prompt, PromptToken, Score, Scored, Stats
from tests.net.gateways import PATIENCE_S, RawClient, raw_client, running_face, scripted_gateway
from tests.net.test_client_questions import logprobs
from tests.net.test_resume import SHORT_S, crash, two_faces
from tests.unit.gateway_fakes import FakeBackend, RefusedError, events


async def test_a_question_is_asked_again_where_a_gateway_is_lost() -> None:
    stalls = iter([True])
    backend = FakeBackend(lambda _: () if next(stalls, False) else events([5]))
    async with two_faces(backend) as (client, faces):
        asking = asyncio.ensure_future(client.score(["one"]))
        async with asyncio.timeout(PATIENCE_S):
            await backend.submitted()
            crash(faces)
            (score,) = await asking
        assert logprobs(score)[1] == -1.0
        assert len(backend.requests) == 2


async def test_what_was_told_before_the_loss_is_told_again_from_the_beginning() -> None:
    token = PromptToken(index=0, token_id=5)
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        asking = asyncio.ensure_future(client.score(token_ids=[[5, 6]], deadline_s=1000))
        await gateway.welcome()
        first = await gateway.receive()
        gateway.send(Prompt(id=1, tokens=[token]))
        gateway.send(Error(id=1, code="unavailable", message="shutting down"))
        second = await gateway.receive()
        gateway.send(Prompt(id=1, tokens=[token]))
        gateway.send(Prompt(id=1, tokens=[PromptToken(index=1, token_id=6, logprob=-1.0)]))
        gateway.send(Scored(id=1, num_prompt_tokens=2))
        (score,) = await asking
        assert [each.token_id for each in score.tokens] == [5, 6]
        assert isinstance(first, Score)
        assert isinstance(second, Score)
        assert first.deadline_ms == 1_000_000
        assert second.deadline_ms is not None
        assert second.deadline_ms <= 1_000_000
        await client.close()


async def test_a_gateway_that_leaves_a_token_out_is_not_believed() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        asking = asyncio.ensure_future(client.score(token_ids=[[5, 6]]))
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Prompt(id=1, tokens=[PromptToken(index=1, token_id=6)]))
        with pytest.raises(ProtocolError, match="token 0 was due"):
            await asking
        assert await gateway.receive() == Cancel(id=1)
        await client.close()


async def test_another_answer_than_the_one_asked_for_is_an_error() -> None:
    async with scripted_gateway() as gateway:
        client = AsyncClient(gateway.endpoint)
        asking = asyncio.ensure_future(client.models())
        await gateway.welcome()
        await gateway.receive()
        gateway.send(Counted(id=1, stats={}))
        with pytest.raises(ProtocolError, match="what was not asked"):
            await asking
        await client.close()


async def test_load_is_told_to_the_caller() -> None:
    refused = RefusedError(OverloadedError("full", retry_after_s=2.0))
    async with (
        running_face(FakeBackend(lambda _: [refused])) as face,
        AsyncClient(face.endpoint) as client,
    ):
        with pytest.raises(OverloadedError) as caught:
            await client.score(["one"])
        assert caught.value.retry_after_s == 2.0


@pytest.mark.parametrize(
    ("deadline_s", "error"), [(None, UnavailableError), (SHORT_S, DeadlineError)]
)
async def test_a_question_that_nobody_answers_ends_in_time(
    deadline_s: float | None, error: type[KvbatonError]
) -> None:
    refused = RefusedError(UnavailableError("no decode worker is alive"))
    resume_s = SHORT_S if deadline_s is None else 60
    async with (
        running_face(FakeBackend(lambda _: [refused])) as face,
        AsyncClient(face.endpoint, resume_s=resume_s) as client,
    ):
        with pytest.raises(error):
            await client.score(["one"], deadline_s=deadline_s)


async def test_a_question_can_be_cancelled_by_its_id() -> None:
    backend = FakeBackend()
    async with running_face(backend) as face, raw_client(face.endpoint) as client:
        await client.hello()
        client.send(Score(id=3, texts=["one"]))
        await backend.submitted()
        error = await cancelled(client, 3)
        assert (error.id, error.code) == (3, CancelledRequestError.code)
        assert isinstance(await client.ask(Stats(id=3)), Counted)


async def cancelled(client: RawClient, request_id: int) -> Error:
    answer = await client.ask(Cancel(id=request_id))
    assert isinstance(answer, Error)
    return answer
