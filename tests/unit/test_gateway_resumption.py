"""A request that goes on after tokens from another gateway: as in the run that nobody disturbed."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pytest

from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import Accepted, Done, Generate, Resume, Timings, Token, Tokens
from kvbaton.questions import Prompt
from kvbaton.sampling import SamplingParams
from services.gateway.backend import GenerationRequest, TokenEvent
from services.gateway.clients.plan import Means
from services.gateway.clients.request import answer
from services.gateway.http.openai.grammars import Grammars
from tests.net.gateways import FakeClock
from tests.unit.gateway_fakes import EOS, FakeBackend, FakeRng, demo_model, says

ID = "a" * 32
SEED = 7
TEXT = "one 🦊 two 🎉 three four\ufffd five 🦊"
TOKENS = [event.token_id for event in says(TEXT)]

Answers = list[Accepted | Prompt | Tokens | Done]


def backend_saying(text: str = TEXT, *, stops: bool = False) -> FakeBackend:
    """It goes on where the request does."""

    def script(request: GenerationRequest) -> list[TokenEvent]:
        return says(text, stops=stops)[len(request.resumed) :]

    return FakeBackend(script)


async def answers(backend: FakeBackend, message: Generate) -> Answers:
    means = Means(backend, demo_model(), Grammars(), FakeClock(), FakeRng())
    parts = answer(message, means, tenant="")
    async with aclosing(parts):
        return [part async for part in parts]


def generate(resume: Resume | None = None, **fields: Any) -> Generate:
    sampling = SamplingParams(seed=SEED, logprobs=1, **fields.pop("sampling", {}))
    return Generate(id=1, text="x", sampling=sampling, resume=resume, **fields)


def tokens_of(parts: Answers) -> list[Token]:
    return [token for part in parts if isinstance(part, Tokens) for token in part.tokens]


def end_of(parts: Answers) -> tuple[Any, ...]:
    end = parts[-1]
    assert isinstance(end, Done)
    return end.finish_reason, end.usage


CASES: list[dict[str, Any]] = [
    {},
    {"stop": ["🎉 three"]},
    {"stop": ["never said", "four"]},
    {"stop": ["one"], "sampling": {"min_tokens": 8}},
    {"stop": ["ee fo", "three four five"], "sampling": {"min_tokens": 3}},
]


@pytest.mark.parametrize("stops", [False, True], ids=["length", "eos"])
@pytest.mark.parametrize("fields", CASES)
async def test_wherever_it_is_cut_the_rest_is_the_same(fields: dict[str, Any], stops: bool) -> None:
    whole = await answers(backend_saying(stops=stops), generate(**fields))
    tokens = tokens_of(whole)
    for num_before in range(len(tokens)):
        resume = Resume(
            request_id=ID, seed=SEED, tokens=[token.token_id for token in tokens[:num_before]]
        )
        rest = await answers(backend_saying(stops=stops), generate(resume, **fields))
        assert tokens_of(rest) == tokens[num_before:]
        assert end_of(rest) == end_of(whole)


async def test_the_last_tokens_say_that_they_are_the_last() -> None:
    parts = await answers(backend_saying(stops=True), generate())
    reasons = [part.finish_reason for part in parts if isinstance(part, Tokens)]
    assert reasons == [None] * len(TOKENS) + ["stop"]


async def test_the_backend_goes_on_under_the_same_name_with_the_same_seed() -> None:
    backend = backend_saying()
    resume = Resume(request_id=ID, seed=2**63 - 1, tokens=TOKENS[:3])
    await answers(backend, generate(resume))
    (request,) = backend.requests
    assert (request.request_id, request.sampling.seed) == (ID, 2**63 - 1)
    assert request.resumed == tuple(TOKENS[:3])


async def test_only_who_asks_hears_that_the_request_is_accepted() -> None:
    backend = backend_saying()
    for is_asked in (False, True):
        parts = await answers(backend, Generate(id=1, text="x", resumable=is_asked))
        accepted = [part for part in parts if isinstance(part, Accepted)]
        request = backend.requests[-1]
        assert request.sampling.seed is not None
        assert (
            accepted
            == [Accepted(id=1, request_id=request.request_id, seed=request.sampling.seed)][
                : int(is_asked)
            ]
        )
        assert parts[: len(accepted)] == accepted


LAST: list[tuple[Resume, dict[str, Any], str]] = [
    (Resume(request_id=ID, seed=1, tokens=[*TOKENS, EOS], finish_reason="stop"), {}, "stop"),
    (Resume(request_id=ID, seed=1, tokens=TOKENS, finish_reason="length"), {}, "length"),
    (
        Resume(request_id=ID, seed=1, tokens=TOKENS),
        {"sampling": {"max_tokens": len(TOKENS)}},
        "length",
    ),
    (
        Resume(request_id=ID, seed=1, tokens=[5] * (2048 - len(demo_model().encode("x")))),
        {},
        "length",
    ),
    (Resume(request_id=ID, seed=1, tokens=[5, 9]), {"sampling": {"stop_token_ids": [9]}}, "stop"),
    (Resume(request_id=ID, seed=1, tokens=TOKENS), {"stop": ["five 🦊"]}, "stop"),
]


@pytest.mark.parametrize(("resume", "fields", "reason"), LAST)
async def test_a_finished_request_ends_at_once_without_a_worker(
    resume: Resume, fields: dict[str, Any], reason: str
) -> None:
    backend = backend_saying()
    (end,) = await answers(backend, generate(resume, **fields))
    assert isinstance(end, Done)
    assert backend.requests == []
    assert (end.finish_reason, end.request_id) == (reason, ID)
    assert end.usage.num_output_tokens == len(resume.tokens)
    assert end.usage.num_prompt_tokens == len(demo_model().encode("x"))
    assert end.timings == Timings(num_attempts=0)


BAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"request_id": "no id of ours"}, {}, "request_id", "32 hexadecimal digits"),
    ({"request_id": "A" * 32}, {}, "request_id", "32 hexadecimal digits"),
    ({"tokens": [5, -1]}, {}, "tokens", "token id -1, the model's are 0 to 2047"),
    ({"tokens": [2048]}, {}, "tokens", "token id 2048"),
    (
        {"tokens": [5] * 4},
        {"sampling": {"max_tokens": 3}},
        "tokens",
        "4 tokens, the request at most 3",
    ),
    ({"tokens": [5] * 2048}, {}, "tokens", "2048 tokens, the request at most"),
    ({"tokens": TOKENS}, {"stop": ["two"]}, "tokens", "after a stop string, complete with token"),
    ({"tokens": [5], "finish_reason": "boredom"}, {}, "finish_reason", "stop or length"),
    ({"finish_reason": "stop"}, {}, "finish_reason", "the last of resume.tokens"),
]


@pytest.mark.parametrize(("resume", "fields", "field", "words"), BAD)
async def test_what_no_gateway_can_have_sent_is_refused_by_field(
    resume: dict[str, Any], fields: dict[str, Any], field: str, words: str
) -> None:
    backend = backend_saying()
    message = generate(Resume(**{"request_id": ID, "seed": SEED, **resume}), **fields)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        await answers(backend, message)
    assert caught.value.field == f"resume.{field}"
    assert backend.requests == []


async def test_a_long_output_is_taken_in_off_the_loop() -> None:
    whole = await answers(backend_saying(TEXT * 20), generate())
    tokens = tokens_of(whole)
    resume = Resume(request_id=ID, seed=SEED, tokens=[token.token_id for token in tokens[:-2]])
    assert len(resume.tokens) > 128
    rest = await answers(backend_saying(TEXT * 20), generate(resume))
    assert tokens_of(rest) == tokens[-2:]
