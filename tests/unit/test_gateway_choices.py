"""Choices of one request: one prefill a prompt, an order, a count, a ranking."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvbaton.errors import KvbatonError, OverloadedError
from kvbaton.sampling import SamplingParams
from services.gateway.access.quotas import Charge, Limits, Quota
from services.gateway.backend import GenerationRequest, PromptToken
from services.gateway.http.openai.choices import Choices, Job, best
from services.gateway.text.generation import TextToken
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


def job(num_prompts: int, n: int, best_of: int | None = None, **sampling: Any) -> Job:
    params = SamplingParams(max_tokens=5, **sampling)
    return Job(
        like=GenerationRequest("http-1", [], params, tenant="acme", priority=3, session_id="s"),
        prompts=[[5 + index, 4] for index in range(num_prompts)],
        n=n,
        best_of=best_of or n,
        stop=(),
        include_stop=False,
        skip_special_tokens=True,
        drops_output=False,
        charge=Charge(Quota(Limits(), 0), 0),
        rng=FakeRng(),
    )


def choices(job: Job, backend: FakeBackend) -> Choices:
    return Choices(job, backend, demo_model(), StillClock())


async def test_a_prompts_other_choices_come_once_it_is_computed() -> None:
    backend = FakeBackend()
    several = choices(job(num_prompts=2, n=3), backend)
    assert [(each.prompt[0], each.choice) for each in backend.requests] == [(5, 0), (6, 0)]
    first = asyncio.ensure_future(anext(several))
    backend.streams[1].feed(says("one two"))
    assert (await first)[0] == 3
    sent = [(each.prompt[0], each.choice) for each in backend.requests]
    assert sent == [(5, 0), (6, 0), (6, 1), (6, 2)]
    await several.close()
    assert all(stream.num_cancels for stream in backend.streams)


async def test_choices_of_a_prompt_share_all_but_their_number() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    several = choices(job(num_prompts=2, n=2, prompt_logprobs=1), backend)
    async for _ in several:
        pass
    await several.close()
    sent = {
        each.request_id: (each.prompt[0], each.choice, each.sampling.seed)
        for each in backend.requests
    }
    assert sent == {
        "http-1": (5, 0, 1), "http-1#1": (5, 1, 1), "http-1#2": (6, 0, 2), "http-1#3": (6, 1, 2),
    }  # fmt: skip
    assert {(each.tenant, each.priority, each.session_id) for each in backend.requests} == {
        ("acme", 3, "s")
    }
    asked = {each.choice: each.sampling.prompt_logprobs for each in backend.requests}
    assert asked == {0: 1, 1: None}, "the prompt is looked at once"


async def test_a_given_seed_is_every_choices_seed() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    several = choices(job(num_prompts=2, n=2, seed=77), backend)
    async for _ in several:
        pass
    await several.close()
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
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, num_output)
    assert usage.total_tokens == 4 + num_output
    assert usage.prompt_tokens_details.cached_tokens == 2
    await several.close()


async def test_one_refused_prompt_frees_those_before_it() -> None:
    def script(request: GenerationRequest) -> Script:
        return [RefusedError(OverloadedError("full"))] if request.prompt[0] == 7 else []

    backend = FakeBackend(script)
    with pytest.raises(OverloadedError):
        choices(job(num_prompts=3, n=1), backend)
    assert [stream.num_cancels for stream in backend.streams] == [1, 1]


async def test_one_refused_choice_fails_all_before_any_token_is_shown() -> None:
    def script(request: GenerationRequest) -> Script:
        return [RefusedError(OverloadedError("full"))] if request.choice == 2 else says("x y")

    backend = FakeBackend(script)
    several = choices(job(num_prompts=1, n=3), backend)
    with pytest.raises(OverloadedError):
        await anext(several)
    await several.close()
    assert [stream.num_cancels > 0 for stream in backend.streams] == [True, True]


async def test_one_failed_choice_fails_all() -> None:
    def script(request: GenerationRequest) -> Script:
        return [OverloadedError("preempted")] if request.choice == 1 else says("x y z")

    several = choices(job(num_prompts=1, n=2), FakeBackend(script))
    with pytest.raises(OverloadedError, match="preempted"):
        [token async for token in several]
    await several.close()


async def test_prompt_logprobs_that_did_not_come_are_an_error_and_not_a_gap() -> None:
    backend = FakeBackend(lambda _request: says("x"))
    several = choices(job(num_prompts=1, n=1, prompt_logprobs=0), backend)
    await anext(several)
    backend.streams[0].prompt_logprobs = []
    with pytest.raises(KvbatonError, match="no log probabilities"):
        several.prompt_logprobs(0)
    backend.streams[0].prompt_logprobs = [PromptToken(4, -0.5)]
    assert several.prompt_logprobs(0) == [PromptToken(4, -0.5)]
    await several.close()


def test_the_best_are_the_likeliest_by_token() -> None:
    def output(*logprobs: float) -> list[TextToken]:
        return [TextToken(i, 5, "", each, (), None) for i, each in enumerate(logprobs)]

    long_and_sure, short, unsure = output(-0.5, -0.5, -0.5), output(-1.0), output(-4.0, -0.1)
    outputs = [unsure, short, long_and_sure, short, unsure, unsure]
    assert best(job(2, n=2, best_of=3), outputs) == [long_and_sure, short, short, unsure]
    assert best(job(2, n=3), outputs) == outputs
